"""The loads on their way, and how many there may be."""

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import BusyError, TooManyAdaptersError
from molehill.api.adapters.generation import Loading
from molehill.api.adapters.name_table import NameTable


class Loads:
    """admission: bounds on them, and on the names that are served when they are done."""

    def __init__(self, admission: AdmissionLimits, names: NameTable) -> None:
        self._admission = admission
        self._names = names
        self._begun: list[Loading] = []

    @property
    def busy(self) -> bool:
        """Whether a load would be refused now, as others are on their way."""
        return len(self._begun) >= self._admission.loads

    def all(self) -> list[Loading]:
        """Those on their way, and those that a restart will begin."""
        begun = {loading.name for loading in self._begun}
        awaited = [loading for name, loading in self._names.awaited.items() if name not in begun]
        return [*self._begun, *awaited]

    def check_not_busy(self) -> None:
        """Raises BusyError."""
        if self.busy:
            raise BusyError(
                f"loads: found {len(self._begun)} on their way, expected fewer than "
                f"{self._admission.loads}"
            )

    def begin(self, name: str, label: str) -> Loading:
        """Before anything is fetched, read or allocated; `end` is to follow.

        label: the source as the client wrote it. Raises BusyError, TooManyAdaptersError.
        """
        self.check_not_busy()
        coming = {loading.name for loading in self._begun if not self._names.get(loading.name)}
        taken = len(self._names) + len(coming)
        is_new = self._names.get(name) is None and name not in coming
        if is_new and taken >= self._admission.adapters:
            raise TooManyAdaptersError(
                f"adapters: found {taken}, expected fewer than {self._admission.adapters}; "
                "unload one first"
            )
        loading = Loading(name, label)
        self._begun.append(loading)
        return loading

    def end(self, loading: Loading) -> None:
        self._begun.remove(loading)
