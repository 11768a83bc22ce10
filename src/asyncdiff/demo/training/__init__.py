"""How the bundled pipelines are trained: settings, loop, autoencoder, denoisers, and what is written."""
