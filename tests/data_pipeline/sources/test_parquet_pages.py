"""What the headers of Parquet pages say agrees with the footer of honest files, and bounds what rows take."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipeline.sources.parquet_pages import ColumnPages, Page, column_pages


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_page_version": "2.0", "compression": "zstd"},
        {"use_dictionary": False, "data_page_size": 3000, "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY", "compression": "none"},
    ],
)
def test_headers_agree_with_an_honest_footer(tmp_path, options):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc ", k=rng.randrange(200))) for _ in range(1000)]
    table = pa.table({"text": texts, "tags": [["x"] * rng.randrange(4) for _ in texts]})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=400, **options)
    with open(tmp_path / "a.parquet", "rb") as raw, pa.parquet.ParquetFile(raw) as file:
        for group in range(3):
            for number in range(2):
                (column,) = column_pages(file, raw.fileno(), group, [number])
                footer = file.metadata.row_group(group).column(number)
                assert sum(page.values for page in column.pages) == footer.num_values
                # Both count pages; the footer counts their headers too.
                most = footer.total_uncompressed_size + footer.total_compressed_size
                assert 0.5 * most < column.dictionary_bytes + sum(page.bytes for page in column.pages) <= most
                assert column.in_lists == (number == 1)


def test_what_rows_take_is_never_more_than_the_bound():
    rng = random.Random(1)
    for _ in range(500):
        pages = [Page(rng.randrange(6), rng.randrange(1, 50), 0) for _ in range(rng.randrange(1, 9))]
        rows = rng.randrange(1, 12)
        owners = [number for number, page in enumerate(pages) for _ in range(page.values)]
        runs = [owners[start : start + rows] for start in range(len(owners))]
        most = max((sum(page.bytes for page in pages[run[0] : run[-1] + 1]) for run in runs), default=0)
        assert ColumnPages(0, pages, False, 0).batch_bytes(rows) >= most
        assert ColumnPages(0, pages, False, 0).batch_bytes(rows) <= sum(p.bytes for p in pages) + 16 * rows
