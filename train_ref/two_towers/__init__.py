"""Two towers, one loss: pairs of images and texts, or of sentences in two languages, trained as CLIP trains and judged by retrieval."""
