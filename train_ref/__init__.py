"""Reference runs: small, complete trainings with a contrastive loss, and the dense losses to compare it with."""
