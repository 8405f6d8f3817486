"""Which SELECTs a model may run: an allow-list over DuckDB's own syntax tree.

The tree is what DuckDB's parser made of the text (``json_serialize_sql``), so comments, quotes,
casing and look-alike letters cannot say one thing to the check and another to the database. What is
not listed here is refused; new syntax of a later DuckDB is refused until somebody lists it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

MAX_TABLES = 3
MAX_SELECTS = 4
MAX_NODES = 250
MAX_CONCATENATIONS = 8  # text must not grow by doubling through nested selects
MAX_WILDCARDS = 2  # in one LIKE pattern: matching backtracks, and not every DuckDB can interrupt it


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Tree nodes, and the kinds of ordering, set down under the key "type".
NODES = _words(
    "SELECT_NODE BASE_TABLE JOIN SUBQUERY EMPTY "
    "ORDER_MODIFIER LIMIT_MODIFIER LIMIT_PERCENT_MODIFIER DISTINCT_MODIFIER "
    "ORDER_DEFAULT ASCENDING DESCENDING NULLS_FIRST NULLS_LAST "
    "COLUMN_REF STAR VALUE_CONSTANT FUNCTION CASE_EXPR OPERATOR_CAST TYPE DECIMAL_TYPE_INFO "
    "CONJUNCTION_AND CONJUNCTION_OR OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL "
    "OPERATOR_COALESCE OPERATOR_NULLIF COMPARE_EQUAL COMPARE_NOTEQUAL COMPARE_LESSTHAN "
    "COMPARE_GREATERTHAN COMPARE_LESSTHANOREQUALTO COMPARE_GREATERTHANOREQUALTO COMPARE_IN "
    "COMPARE_NOT_IN COMPARE_BETWEEN COMPARE_NOT_BETWEEN COMPARE_DISTINCT_FROM "
    "COMPARE_NOT_DISTINCT_FROM"
)
LIKES = frozenset(("~~", "!~~", "~~*", "!~~*"))  # LIKE, NOT LIKE, ILIKE, NOT ILIKE
FUNCTIONS = LIKES | _words(
    "+ - * / // % || abs round floor ceil ceiling mod greatest least "
    "lower upper length char_length trim ltrim rtrim left right substr substring strpos instr "
    "position contains starts_with prefix suffix ends_with split_part ifnull nullif "
    "strptime try_strptime year month day date_part datepart date_diff datediff "
    "count count_star min max sum avg"
)
TYPES = _words(
    "VARCHAR TEXT STRING BOOLEAN BOOL TINYINT SMALLINT INTEGER INT BIGINT HUGEINT FLOAT REAL "
    "DOUBLE DECIMAL NUMERIC DATE TIMESTAMP"
)
# Names that DuckDB reads as calls of functions where no column is called so.
VALUE_FUNCTIONS = _words(
    "current_catalog current_date current_role current_schema current_time current_timestamp "
    "current_user localtime localtimestamp session_user user"
)
# Words for what users try most; the rest is named by its node.
NAMES = {
    "TABLE_FUNCTION": "table functions",
    "EXPRESSION_LIST": "VALUES",
    "SHOW_REF": "SHOW and DESCRIBE",
    "SET_OPERATION_NODE": "UNION, INTERSECT and EXCEPT",
    "RECURSIVE_CTE_NODE": "WITH RECURSIVE",
    "CTE_NODE": "WITH",
    "PIVOT": "PIVOT",
    "VALUE_PARAMETER": "parameters",
    "LAMBDA": "lambdas",
}


class RefusedError(ValueError):
    """Why a query is not run, in words that a model can read."""


def check_select(parsed: dict[str, Any], columns: Collection[str] = ()) -> None:
    """Refuse everything but one SELECT over the table ``people``.

    Args:
        parsed: what ``json_serialize_sql`` returned, decoded.
        columns: of the table, in lower case.

    Raises:
        RefusedError: naming what is not allowed.
    """
    if parsed.get("error"):
        if parsed.get("error_type") == "not implemented":
            raise RefusedError("only SELECT is allowed")
        raise RefusedError(str(parsed.get("error_message", "the query cannot be read")))
    statements = parsed.get("statements", [])
    if len(statements) != 1:
        raise RefusedError("write exactly one SELECT")
    tables = selects = nodes = concatenations = 0
    waiting: list[Any] = [statements[0]]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
            continue
        if not isinstance(item, dict):
            continue
        _check_node(item)
        if item.get("type") == "COLUMN_REF":
            name = str((item.get("column_names") or [""])[0]).lower()
            if name in VALUE_FUNCTIONS and name not in columns:
                raise RefusedError(f"{name} is not allowed")
        kind = item.get("type")
        nodes += isinstance(kind, str)
        tables += kind == "BASE_TABLE"
        selects += kind == "SELECT_NODE"
        concatenations += item.get("function_name") == "||"
        waiting.extend(item.values())
    if tables == 0:
        raise RefusedError("select from the table people")
    if tables > MAX_TABLES or selects > MAX_SELECTS or nodes > MAX_NODES:
        raise RefusedError("the query is too complex")
    if concatenations > MAX_CONCATENATIONS:
        raise RefusedError("too many ||")


def _check_node(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if isinstance(kind, str) and kind not in NODES:
        what = "window functions" if kind.startswith("WINDOW") else NAMES.get(kind)
        raise RefusedError(f"{what or kind.lower().replace('_', ' ')} are not allowed")
    if node.get("sample"):
        raise RefusedError("TABLESAMPLE is not allowed")
    if (node.get("cte_map") or {}).get("map"):
        raise RefusedError("WITH is not allowed")
    path = (node.get("qualified_name") or {}).get("path", [])
    prefixes = [node.get(key) for key in ("catalog", "schema", "catalog_name", "schema_name")]
    if len(path) > 1 or any(prefixes):
        raise RefusedError("names with a schema are not allowed")
    if kind == "BASE_TABLE" and str(node.get("table_name")).lower() != "people":
        raise RefusedError(f"there is no table {node.get('table_name')}, only people")
    if "function_name" in node:
        _check_function(node)
    if kind == "STAR" and node.get("columns"):
        raise RefusedError("COLUMNS is not allowed")
    if kind == "OPERATOR_CAST":
        _check_cast(node)


def _check_function(node: dict[str, Any]) -> None:
    name = str(node["function_name"]).lower()
    if name not in FUNCTIONS:
        raise RefusedError(f"the function {name} is not allowed")
    if name in LIKES:
        pattern = _constant_text(_arguments(node)[-1])
        if pattern is None or sum(map(pattern.count, "%_")) > MAX_WILDCARDS:
            raise RefusedError(f"LIKE takes a text with at most {MAX_WILDCARDS} wildcards")


def _arguments(node: dict[str, Any]) -> list[dict[str, Any]]:
    if "arguments" in node:  # DuckDB 2
        return [argument["expression"] for argument in node["arguments"]]
    return list(node.get("children") or [{}])


def _constant_text(node: dict[str, Any]) -> str | None:
    if node.get("type") != "VALUE_CONSTANT":
        return None
    if "literal" in node:  # DuckDB 2
        return str(node["literal"].get("text", ""))
    return str(node["value"].get("value", ""))


def _check_cast(node: dict[str, Any]) -> None:
    if "type_expr" in node:  # DuckDB 2
        name = node["type_expr"].get("type_name")
    else:
        name = node.get("cast_type", {}).get("id")
    if str(name).upper() not in TYPES:
        raise RefusedError("a cast to this type is not allowed")
