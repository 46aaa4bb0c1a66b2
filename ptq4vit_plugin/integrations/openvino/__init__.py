"""OpenVINO: the IR exporter, and the passes over its graph that make products run in int8."""
