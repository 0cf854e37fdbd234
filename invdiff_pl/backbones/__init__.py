"""The frozen backbone: loading, noising, sampling."""
