"""CUDA graphs for decoding: written from PyTorch's documentation, run by us with a stand-in only."""

import torch


class Graph:
    """A function of one tensor recorded as a CUDA graph: replaying it costs one launch instead of hundreds.

    Its input is copied into the recorded one, its output overwritten by the next call.
    """

    def __init__(self, function, example: torch.Tensor):
        self.input, self.graph, stream = (
            example.clone(),
            torch.cuda.CUDAGraph(),
            torch.cuda.Stream(),
        )
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # once outside of the recording: what libraries set up lazily must not be in it
            function(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.output = function(self.input)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output
