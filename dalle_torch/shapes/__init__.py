"""Captioned pictures of simple shapes: what captions can say, what scenes look like, whether a picture is right."""
