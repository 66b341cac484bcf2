"""What a selection takes, as data, and the SQL that says so.

The rules apply in this order, each to what the former ones leave:
1. `tasks` and `where`: rows for which all conditions are true (null is not true).
2. `per` and `top`: at most `top` rows of each value of `per`; without `per`, of each group of `balance`, or of all.
3. `balance`: as many rows of each value as the rarest one has; rows whose value is null are left out, so that what is
   unknown is never counted as general.
Which rows go first is decided by `spread`, then `best` (highest first), then a hash of the seed and the key. With
`spread`, the rows of a group come in turn from each of its values: the best of each, then the second best of each.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emma_train.errors import UserError


@dataclass(frozen=True)
class SelectionRules:
    """Expressions are SQL over the columns of the index and, as OPERATOR.COLUMN, those of operators."""

    tasks: tuple[str, ...] = ()
    """Keys of records: i2t, t2i, it2i; empty takes rows of all."""
    where: tuple[str, ...] = ()
    per: str = ""
    top: int = 0
    """0 takes all."""
    balance: str = ""
    spread: str = ""
    best: str = ""
    tag: str = ""
    """A text or null: a tag that selected rows get in addition."""
    captions: str = ""
    """A text or null: a further caption of the record, if that has one image."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per and not self.top:
            raise UserError(f"--per {self.per}: says of what there are at most --top rows; give --top too")
        for name, expression in self.expressions():
            if re.search(r";|--|/\*", expression):
                raise UserError(f"--{name} {expression}: is no single expression; ; -- and /* are not allowed in it")

    def expressions(self) -> list[tuple[str, str]]:
        """(option, expression) of all that are set."""
        named = [("where", text) for text in self.where]
        named += [(name, getattr(self, name)) for name in ("per", "balance", "spread", "best", "tag", "captions")]
        return [(name, text) for name, text in named if text]

    def as_values(self) -> dict[str, Any]:
        """As a manifest has them: those that are set."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items() if v or name == "seed"}


def operators_in(rules: SelectionRules, available: Collection[str]) -> list[str]:
    """The operators that some rules name, of those whose columns are available, in order. An operator with - in its
    name is written with _ (judge_edit.score). Raises UserError for columns of one that has not run."""
    used = set()
    for option, expression in rules.expressions():
        without_texts = re.sub(r"'(?:[^']|'')*'", "''", expression)
        for name in re.findall(r"(?<![\w.])([A-Za-z_]\w*)\s*\.\s*[A-Za-z_\"]", without_texts):
            matches = [operator for operator in available if sql_name(operator) == name.lower()]
            if not matches:
                columns = ", ".join(sorted(map(sql_name, available))) or "none"
                raise UserError(
                    f"--{option} {expression}: not all shards have columns of {name}; run `emma-data annotate` first "
                    f"(all have those of: {columns})"
                )
            used.add(matches[0])
    return sorted(used)


def sql_name(operator: str) -> str:
    """The name of an operator's table in expressions."""
    return operator.replace("-", "_").lower()


def selection_sql(rules: SelectionRules, joined: str) -> str:
    """SQL for the selected rows: shard, number, tag, caption; ordered by shard and number of the row in its index.

    `joined` is the SQL of the index rows with the columns of operators. Names with an underscore before them are ours.
    """
    best = f"TRY_CAST(({rules.best}) AS DOUBLE)" if rules.best else "NULL::DOUBLE"
    per = rules.per or rules.balance
    values = {
        "_best": f"CASE WHEN isnan({best}) THEN NULL ELSE {best} END",
        "_per": f"CAST(({per}) AS VARCHAR)" if per else "''",
        "_balance": f"CAST(({rules.balance}) AS VARCHAR)" if rules.balance else "''",
        "_spread": f"CAST(({rules.spread}) AS VARCHAR)" if rules.spread else "''",
        "_tag": f"CAST(({rules.tag}) AS VARCHAR)" if rules.tag else "NULL::VARCHAR",
        "_caption": f"CAST(({rules.captions}) AS VARCHAR)" if rules.captions else "NULL::VARCHAR",
        "_tie": f"md5(concat('{int(rules.seed)}/', key))",
    }
    columns = ", ".join(f"{expression} AS {name}" for name, expression in values.items())
    base = f"SELECT _shard, _number, {columns} FROM {joined} WHERE {condition(rules)}"
    if rules.balance:
        base = f"SELECT * FROM ({base}) WHERE _balance IS NOT NULL"
    if rules.top:
        base = f"SELECT * FROM ({_ranked(base, '_per')}) WHERE _rank <= {int(rules.top)}"
    if rules.balance:
        sizes = "SELECT min(_n) FROM (SELECT count(*) AS _n FROM _base GROUP BY _balance)"
        ranked = _ranked("SELECT * EXCLUDE (_rank) FROM _base" if rules.top else "SELECT * FROM _base", "_balance")
        base = f"WITH _base AS MATERIALIZED ({base}) SELECT * FROM ({ranked}) WHERE _rank <= ({sizes})"
    return f"SELECT _shard, _number, _tag, _caption FROM ({base}) ORDER BY _shard, _number"


def condition(rules: SelectionRules, num_where: int | None = None) -> str:
    """SQL that is true for rows that the rules' tasks and (the first `num_where` of) its conditions accept."""
    tasks = ", ".join(f"'{task}'" for task in rules.tasks)
    parts = [f"task IN ({tasks})"] if tasks else []
    parts += [f"({expression})" for expression in rules.where[:num_where]]
    return " AND ".join(parts) or "TRUE"


def _ranked(base: str, group: str) -> str:
    """The rows of `base` with their rank in their group."""
    order = "_best DESC NULLS LAST, _tie, _shard, _number"
    turns = f"SELECT *, row_number() OVER (PARTITION BY {group}, _spread ORDER BY {order}) AS _turn FROM ({base})"
    return (
        f"SELECT * EXCLUDE (_turn), row_number() OVER (PARTITION BY {group} ORDER BY _turn, {order}) AS _rank "
        f"FROM ({turns})"
    )


def aspect_bucket(width: str = "size.width", height: str = "size.height") -> str:
    """SQL for the nearest of the usual aspect ratios of an image, for `spread`."""
    ratios = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")
    edges = [_ratio(name) for name in ratios]
    cases = " ".join(
        f"WHEN {width} < {(low * high) ** 0.5:.4f} * {height} THEN '{name}'"
        for name, low, high in zip(ratios, edges, edges[1:], strict=False)
    )
    return f"CASE {cases} ELSE '{ratios[-1]}' END"


def expand_macros(expressions: Sequence[str]) -> list[str]:
    """Expressions in which `aspect_bucket()` stands for its SQL."""
    return [text.replace("aspect_bucket()", aspect_bucket()) for text in expressions]


def _ratio(name: str) -> float:
    width, _, height = name.partition(":")
    return int(width) / int(height)
