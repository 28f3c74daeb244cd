"""Video files: what is in a clip, its frames as upright RGB pixels, and frames -> a file with the clip's sound."""
