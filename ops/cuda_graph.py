"""CUDA graphs for decoding; written from PyTorch's documentation, tested with a stand-in only."""

import torch


class Graph:
    """A function of one tensor, recorded as a CUDA graph: a replay is one launch, not hundreds.

    A call copies its argument into the recorded input; its result is overwritten by the next call.
    """

    def __init__(self, function, example: torch.Tensor):
        self.input = example.clone()
        # run it once before recording: what libraries set up lazily must not be part of the graph
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(self.input)
        torch.cuda.current_stream().wait_stream(stream)

        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(self.input)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output
