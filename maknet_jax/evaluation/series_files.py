"""The files that `maknet predict` writes: their names, and whether they may be written."""

import dataclasses
import glob
import pathlib
from collections.abc import Sequence

import numpy as np

from maknet_jax import console, files
from maknet_jax.ct import reading
from maknet_jax.errors import InputError, OutputExists
from maknet_jax.evaluation import series_tables
from maknet_jax.evaluation.series import SeriesResult
from maknet_jax.evaluation.series_tables import SERIES_COLUMNS, SLICE_COLUMNS


@dataclasses.dataclass(frozen=True)
class SeriesFiles:
    """The files that `maknet predict` writes, except for charts and structured reports.

    Attributes:
      out: the CSV of slices; the names of the others start with its stem.
      as_json: also write STEM.json.
      wide: also write STEM.wide.csv.
      audit: also write STEM.audit.csv.
      features: an .npz file for the pooled features; None writes none.
    """

    out: pathlib.Path
    as_json: bool
    wide: bool
    audit: bool
    features: pathlib.Path | None

    def beside(self, ending: str) -> pathlib.Path:
        """STEM.ending beside the CSV."""
        return self.out.with_suffix(f".{ending}")

    def check(self, *, overwrite: bool) -> None:
        """Checks the names, and that no output exists; a log is continued, failures are replaced.

        Raises:
          InputError: a name has another ending or is that of a folder, or an output exists.
        """
        if self.out.suffix == ".json" and not self.out.is_dir():
            name = self.out.with_suffix(".csv")
            raise InputError(f"--out {self.out}: pass {name} and add --json, which writes both")
        files.check_file_name(self.out, ".csv")
        if self.features is not None:
            files.check_file_name(self.features, ".npz", "--features")
        endings = ("series.csv", "wide.csv", "audit.csv", "json", "summary.json")
        outputs = [self.out, *map(self.beside, endings)]
        stem = f"{glob.escape(self.out.stem)}.[0-9][0-9][0-9]"
        for ending in ("png", "sr.dcm"):
            outputs += sorted(self.out.parent.glob(f"{stem}.{ending}"))
        outputs += [self.features] if self.features is not None else []
        for output in outputs:
            if output.exists() and not overwrite:
                raise OutputExists(output)

    def written_before(self) -> set[pathlib.Path]:
        """The outputs of an earlier run with the same `out`, from its summary."""
        try:
            listed = files.read_json(self.beside("summary.json"))["files"]
            paths = {(self.out.parent / pathlib.Path(file).name).absolute() for file in listed}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return set()
        return {path for path in paths if path.name.startswith(f"{self.out.stem}.")}

    def write(
        self,
        results: Sequence[SeriesResult],
        overrides: reading.Overrides,
    ) -> list[pathlib.Path]:
        """Writes the tables and features of at least one series; returns the files.

        `overrides` is recorded in the JSON.
        """
        written = [self.out, self.beside("series.csv")]
        slice_rows = (row for result in results for row in result.slice_rows())
        cover_rows = (row for result in results for row in result.cover_rows())
        series_tables.write_rows(written[0], SLICE_COLUMNS, slice_rows)
        series_tables.write_rows(written[1], SERIES_COLUMNS, cover_rows)
        if self.wide:
            written.append(self.beside("wide.csv"))
            console.write_table(written[-1], *series_tables.wide(results))
        if self.audit:
            written.append(self.beside("audit.csv"))
            overview = [result.overview() for result in results]
            series_tables.write_rows(written[-1], series_tables.AUDIT_COLUMNS, overview)
        if self.as_json:
            written.append(self.beside("json"))
            names, thresholds = results[0].names, results[0].thresholds
            document = series_tables.document(results, names, thresholds)
            files.write_json(written[-1], document | dataclasses.asdict(overrides))
        if self.features is not None:
            written.append(self.features)
            pooled = [result.features for result in results if result.features is not None]
            ids = [f"{result.id}:{number}" for result in results for number in range(len(result))]
            with files.write_whole(self.features, "wb") as file:
                np.savez(file, features=np.concatenate(pooled), ids=np.array(ids))
        return written
