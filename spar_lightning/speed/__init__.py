"""Speed of teacher, training, segmentation and loader, compared with the network alone and the published procedure."""
