"""The two scripts of the original research code: its flags and configuration files, run by our stages."""
