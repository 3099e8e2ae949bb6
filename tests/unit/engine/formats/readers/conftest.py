"""Adapters made of others, with changes."""

import json
import shutil

import pytest


@pytest.fixture
def copied(authored, tmp_path):
    """`copied(name, document={...})`: a copy of a made adapter with other fields in its file."""

    def copy(name, document=None):
        shutil.copytree(authored[name].path, tmp_path / name)
        file = tmp_path / name / "molehill_mix.json"
        fields = {**json.loads(file.read_text()), **(document or {})}
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
        return tmp_path / name

    return copy
