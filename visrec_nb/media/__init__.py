"Safe image and video decoding, coarse motion, rendered camera moves."
