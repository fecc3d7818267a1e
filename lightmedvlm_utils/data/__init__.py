"""From files to the balanced study table: readers, report text, labels, clusters, questions, images."""
