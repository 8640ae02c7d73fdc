"""What is differentiated, on what: objective, losses, batches, perturbations, and the model handed back as it came."""
