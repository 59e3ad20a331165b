"""A folder as a storage that is slow, or hangs: `slow:///folder`, in every Python that has this folder on PYTHONPATH.

While the folder has a file `hang`, nothing is written or read there; while it has a file `slow`, writing a file takes
half a second.
"""

import time
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class SlowFileSystem(LocalFileSystem):
    protocol = "slow"
    folder = Path("/")  # of the storage

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("slow://"))

    @classmethod
    def _get_kwargs_from_urls(cls, path):
        cls.folder = Path(cls._strip_protocol(path))
        return {}

    def _wait(self, seconds):
        if (self.folder / "slow").exists():
            time.sleep(seconds)
        while (self.folder / "hang").exists():
            time.sleep(0.05)

    def put_file(self, *args, **kwargs):
        self._wait(0.5)
        return super().put_file(*args, **kwargs)

    def pipe_file(self, *args, **kwargs):
        self._wait(0.5)
        return super().pipe_file(*args, **kwargs)

    def cat_file(self, *args, **kwargs):
        self._wait(0)
        return super().cat_file(*args, **kwargs)


fsspec.register_implementation("slow", SlowFileSystem)
