"""The data sources that come with the plugin, one file each."""
