"""Where a model comes from: names, hubs and caches in, files on local disk out."""
