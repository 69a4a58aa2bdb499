"""What all models share: layers, attention, rotary embedding, weight conversion, sampling."""
