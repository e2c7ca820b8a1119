# SPDX-License-Identifier: Apache-2.0
"""Files that others publish and vqjax never downloads: where they are, how large, which hash."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """One file as its authors publish it.

    Attributes:
      name: of the file.
      what: it holds, in a few words.
      url: where people get it.
      size: in bytes, or in words where it is known from the content only.
      sha256: how it begins, or "" where its authors published none.
      known_from: what size and hash are taken from.
    """

    name: str
    what: str
    url: str
    size: int | str
    sha256: str
    known_from: str

    def describe(self) -> str:
        """One line that a person can act on."""
        digest = f"sha256 {self.sha256}..." if self.sha256 else "sha256 not published"
        size = self.size if isinstance(self.size, str) else f"{self.size:,} bytes"
        return f"{self.name}: {self.what}; {size}, {digest} ({self.known_from}); {self.url}"

    def doubt(self, path: str | os.PathLike) -> str | None:
        """Why the file at `path` is another one than the published; None where nothing says so.

        The sentence names the file as published, not by its path: records keep it.

        Raises:
          OSError: if the file cannot be read.
        """
        size = os.path.getsize(path)
        if isinstance(self.size, int) and size != self.size:
            found, expected = f"{size:,} bytes", f"{self.size:,}"
        elif self.sha256 and not (sha256 := sha256_of(path)).startswith(self.sha256):
            found, expected = f"sha256 {sha256[: len(self.sha256)]}...", f"{self.sha256}..."
        else:
            return None
        return (
            f"{self.name}: found {found}, the published file has {expected} ({self.known_from}); "
            "results compare with published ones only if the content is the same. It is at "
            f"{self.url}"
        )


INCEPTION = PublishedFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    what="the FID network",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    size="about 95.6 MB",
    sha256="6726825d",
    known_from="23,885,392 float32 numbers; the hash is in the name",
)
IMAGENET_REFERENCE = PublishedFile(
    name="VIRTUAL_imagenet256_labeled.npz",
    what="10,000 pictures of ImageNet 256 and the statistics of its training set",
    url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz",
    size=2_037_122_530,
    sha256="b32732719497e426",
    known_from="a mirror, huggingface.co/WindATree/diffusion-data; the authors give neither",
)
CIN256_V2 = PublishedFile(
    name="model.ckpt",
    what="cin256-v2, the class-conditional LDM-4 of ImageNet 256",
    url="https://ommer-lab.com/files/latent-diffusion/nitro/cin/model.ckpt",
    size=1_827_378_153,
    sha256="",
    known_from="the log in the authors' notebook; 906 tensors in float32, no EMA copy",
)
VGG16 = PublishedFile(
    name="vgg16-397923af.pth",
    what="VGG16, the network of LPIPS",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    size="about 553 MB",
    sha256="397923af",
    known_from="138,357,544 float32 numbers; the hash is in the name",
)
LPIPS = PublishedFile(
    name="vgg.pth",
    what="the channel weights of LPIPS 0.1",
    url="https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
    size="about 7 KB",
    sha256="",
    known_from="1,472 float32 numbers",
)
FILES = {file.name: file for file in (INCEPTION, IMAGENET_REFERENCE, CIN256_V2, VGG16, LPIPS)}


def doubts(paths: Iterable[str | os.PathLike]) -> list[str]:
    """`PublishedFile.doubt` of those files that bear a name of `FILES`."""
    known = [(FILES.get(os.path.basename(path)), path) for path in paths]
    found = [file.doubt(path) for file, path in known if file is not None]
    return [sentence for sentence in found if sentence is not None]


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
