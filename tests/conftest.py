import torch
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy one takes its time
settings.load_profile("any machine")
torch.set_num_threads(1)  # the models in here are tiny: threads would only wait for each other
