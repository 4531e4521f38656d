"""Keeps every test off the network, and runs the small models on one thread, which is fastest."""
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1",
                  TOKENIZERS_PARALLELISM="false", TORCH_CPP_LOG_LEVEL="ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")
