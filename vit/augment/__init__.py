"""Random changes of training images: policies, crops, erasing and mixing."""
