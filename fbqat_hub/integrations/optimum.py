"""optimum: quantization without training as one of optimum's quantizers; ``from fbqat_hub import FBQATQuantizer``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from diffusers import ModelMixin
from optimum.quantization_base import OptimumQuantizer

from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import family_of_denoiser
from fbqat_hub.pipelines import check_source
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.teachers import resolve_teacher


class FBQATQuantizer(OptimumQuantizer):
    """Quantizes a float pipeline, or the denoiser of one, to W4A8 without training.

    Of a folder or a Hub id it is what `fbqat convert` does, a tensor at a time. A loaded model is left as it is.
    """

    def __init__(self, source: str | ModelMixin, variant: str | None = None) -> None:
        self.source, self.variant = source, variant

    @classmethod
    def from_pretrained(
        cls, model_or_path: str | Path | ModelMixin, file_name: str | None = None, *, variant: str | None = None
    ) -> Self:
        """Of a float model. No weights are read yet, and nothing is downloaded.

        Args:
            model_or_path: folder or Hub id of a pipeline, or a loaded denoiser (``pipeline.transformer``).
            file_name: of other quantizers; a pipeline is a folder.
            variant: of the folder's weights, e.g. "fp16".

        Raises:
            FileNotFoundError: neither a folder nor in the form of a Hub id.
            ValueError: ``file_name``; a folder that is no whole pipeline; a model that is quantized, or is of no
                supported family.
        """
        if file_name is not None:
            raise ValueError(f"file_name is {file_name!r}; a pipeline is a folder, give that and leave file_name out.")
        if isinstance(model_or_path, str | Path):
            check_source(resolve_teacher(str(model_or_path)), variant)
            return cls(str(model_or_path), variant)
        if not isinstance(model_or_path, ModelMixin):
            raise ValueError(
                f"a {type(model_or_path).__name__} was given; give a pipeline's folder or Hub id, or its denoiser "
                "(pipeline.transformer)."
            )
        family_of_denoiser(type(model_or_path).__name__)
        if getattr(model_or_path, "is_quantized", False):
            raise ValueError(
                f"this {type(model_or_path).__name__} is quantized already; give the full-precision model."
            )
        return cls(model_or_path, variant)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        text_encoders: str | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> Path:
        """Write the packed pipeline or, of a loaded denoiser, the packed denoiser; ``from_pretrained`` loads it.

        Args:
            save_dir: new or empty folder.
            file_prefix: of other quantizers; the names of the files are the format's.
            text_encoders: of a pipeline, "w8a8", "w8", "w4a8" or "w4"; None copies them.
            progress: of a pipeline, show a bar.
            settings: fields of ``FBQATConfig``, e.g. ``average_bits=4.5``. Without ``module_overrides`` the family's.

        Returns:
            The folder.

        Raises:
            FileExistsError: ``save_dir`` has content.
            ValueError: ``file_prefix``, an unknown setting, or as ``fbqat convert``.
        """
        if file_prefix is not None:
            raise ValueError(f"file_prefix is {file_prefix!r}; the format names the files, leave file_prefix out.")
        output = Path(save_dir)
        if isinstance(self.source, str):
            return convert_pipeline(
                self.source, output, settings, self.variant, text_encoders=text_encoders, progress=progress
            )
        if text_encoders is not None:
            raise ValueError("text_encoders is of a pipeline; a denoiser has none. Give the pipeline's folder.")
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"{output} exists and is not empty; give another save_dir.")
        family = family_of_denoiser(type(self.source).__name__)
        config = FBQATConfig(**{"module_overrides": family.activation_overrides, **settings})
        with TemporaryDirectory() as folder:  # of the float model: it is read and packed a tensor at a time
            self.source.save_pretrained(folder)
            packed = type(self.source).from_pretrained(folder, quantization_config=config, dtype=self.source.dtype)
            packed.save_pretrained(output)
        return output
