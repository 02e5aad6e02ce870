"""Text files and tokenizers: what calibration and evaluation of language models read. Without torch."""
