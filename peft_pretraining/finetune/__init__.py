"""Fine-tuning: the training methods through transformers' `Trainer`, on GLUE and option tasks."""
