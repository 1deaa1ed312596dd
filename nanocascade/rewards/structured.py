"""Structured output: the answer is one document that fits the row's JSON schema.

Where: the whole answer, alone or in one ``` fence, or (response_mode "tool_call") the argument
`tool_payload_key` of the only call, to `tool_name`. As in NeMo Gym, schemas are read strictly:
every declared property is required and no other allowed.

Refused, because readers differ on what they mean or because they explode: a key that comes twice,
NaN and infinities, YAML aliases and tags, XML with a DOCTYPE or attributes. The helper process
parses what is not JSON and, with jsonschema (extra), checks schemas of more than types, fields and
constants: their patterns may backtrack without end.
"""

import json
import re
import tomllib
from calendar import monthrange
from functools import lru_cache
from xml.etree import ElementTree

from nanocascade.rewards.base import Reward
from nanocascade.sandbox.worker import TookTooLong, require, worker

MAX_TEXT = 200_000  # characters of a document
TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    type(None): "null",
    int: "integer",
    float: "number",
}
DATE = r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)"
FORMATS = {  # `format` of texts, as patterns, and of integers, as a number of bits
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}[Tt ]{TIME}",
    "email": r"[^@\s]+@[^@\s]+",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]*",
    "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?!$)|$)){4}",
    "int32": 32,
    "int64": 64,
}


# ---- Documents -----------------------------------------------------------------------------------


def refuse(what):
    """For something that the format allows and we do not; an expression, to fit into one."""
    raise ValueError(f"{what} is refused")


def distinct(pairs):
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else refuse("a key that comes twice")


def parse_json(text):
    """JSON in this process: the library is quick, and bounds the depth and the digits itself."""
    text = text if len(text) <= MAX_TEXT else refuse("a text this long")
    return json.loads(text, object_pairs_hook=distinct, parse_constant=refuse)


def parse_yaml(text):
    import yaml

    for event in yaml.parse(text, yaml.BaseLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            refuse("an alias or a tag")
    return yaml_value(yaml.compose(text, yaml.BaseLoader))


YAML_FORMS = [  # of YAML 1.2: `on` and 2024-05-10 are texts, 007 is 7, 1e3 a number
    (r"~|null|Null|NULL|", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", float),
]


def yaml_value(node):
    if node.id == "sequence":
        return [yaml_value(item) for item in node.value]
    if node.id == "mapping":
        return distinct([(key.value, yaml_value(item)) for key, item in node.value])
    for form, convert in YAML_FORMS:
        if node.style is None and re.fullmatch(form, node.value):  # without quotes
            return convert(node.value)
    return node.value


NIL = "{http://www.w3.org/2001/XMLSchema-instance}nil"
XML_FORMS = [  # as XML Schema writes them
    ("boolean", "true|false|True|False|1|0", lambda text: text.lower() in ("true", "1")),
    ("integer", r"[+-]?\d{1,400}", int),
    ("number", r"[+-]?(?:\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE][+-]?\d{1,4})?", float),
]


def parse_xml(text, schema):
    """The root's value, or {root: value} if the schema names the root: else it only wraps."""
    # Without a DOCTYPE there are no entities to expand.
    root = refuse("a DOCTYPE") if "<!DOCTYPE" in text else ElementTree.fromstring(text)
    for element in root.iter():
        between = [element.text, *(child.tail for child in element)] if len(element) else []
        if {*element.attrib} - {NIL} or "".join(part or "" for part in between).strip():
            refuse("an attribute or text between elements")
    named = set(allowed(schema, schema)[1]) == {root.tag}
    return xml_fields([root], schema, schema) if named else xml_value([root], schema, schema)


def xml_fields(elements, schema, whole):
    groups, fields = {}, allowed(schema, whole)[1]
    for element in elements:
        groups.setdefault(element.tag, []).append(element)
    return {name: xml_value(group, fields.get(name, {}), whole) for name, group in groups.items()}


def xml_value(elements, schema, whole):
    """What elements of one name hold, as the type that the schema names, since XML has none.

    <n>7</n> -> 7; <t>a</t><t>b</t> and <t><x>a</x><x>b</x></t> -> ["a", "b"], unless items have a
    field x: then the latter is one of them.
    """
    (kinds, _, items, listed), first = allowed(schema, whole), elements[0]
    text, inner = (first.text or "").strip(), {child.tag for child in first}
    if "array" in kinds and not (text and "string" in kinds):
        wrapped = len(elements) == 1 and len(inner) < 2 and not text
        wrapped = wrapped and not inner & {*allowed(items, whole)[1]}
        return [xml_value([x], items, whole) for x in (first if wrapped else elements)]
    if inner or len(elements) > 1:
        return xml_fields(first, schema, whole) if len(elements) == 1 else refuse("a name twice")
    if "null" in kinds and (not text or first.get(NIL) in ("true", "1")):
        return None
    texts = {"string", "object"} & {*kinds}
    # Of a text and 1, "1" is the text, unless the texts are listed and it is none of them.
    if texts and (not listed or text in listed):
        return text
    for kind, form, convert in XML_FORMS:
        known = kind in kinds or not kinds or kind == "integer" and "number" in kinds
        if known and re.fullmatch(form, text, re.ASCII):
            return text if texts and kind not in kinds else convert(text)
    return text  # the schema will object to it


PARSERS = {  # format -> (function for the helper process, the module it needs)
    "yaml": (parse_yaml, "yaml"),
    "toml": (tomllib.loads, "tomllib"),  # takes quadratic time on dotted keys
    "xml": (parse_xml, "xml.etree.ElementTree"),
}


# ---- Schemas -------------------------------------------------------------------------------------


def types_of(schema):
    """The types that a schema names itself; none if it allows all."""
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else [*types]
    return [*types, "null"] if types and schema.get("nullable") is True else types  # OpenAPI


def parts_of(schema, whole):
    """A schema of `whole`, what it refers to and its alternatives, at any depth."""
    if not isinstance(schema, dict):
        return
    yield schema
    inner = [part for key in PARTS for part in schema.get(key, [])]
    if schema.get("$ref", "").startswith("#/"):  # "#/$defs/pet"
        inner.append(resolve(schema["$ref"], whole))
    for part in inner:
        yield from parts_of(part, whole)


def allowed(schema, whole):
    """(types, {field: schema}, the items' schema, listed values) of all parts of a schema:
    {"anyOf": [{"type": ["null"]}, {"enum": ["a"]}]} -> ["null", "string"], {}, {}, ["a"]."""
    types, fields, items, listed = [], {}, {}, []
    for part in parts_of(schema, whole):
        values = part.get("enum", []) + ([part["const"]] if "const" in part else [])
        listed += values
        types += types_of(part) or [TYPES[type(value)] for value in values]
        fields = part.get("properties", {}) | fields
        items = items or part.get("items", {})
    return types, fields, items, listed


def resolve(reference, whole):
    """What a reference into the schema itself leads to."""
    start, *path = reference.split("/")
    if start != "#":
        raise ValueError(f"the reference {reference!r} leads out of the schema")
    for key in path:
        whole = whole[int(key)] if isinstance(whole, list) else whole.get(key, {})
    return whole


# Keywords that `mismatches` knows, and those that decide nothing.
SIMPLE = "type items enum const format nullable title description default examples $schema"
SIMPLE = set(SIMPLE.split())
FIELDS = {"properties", "required", "additionalProperties"}
PARTS = ("allOf", "anyOf", "oneOf")
CONDITIONS = set("if then else not contains propertyNames dependentSchemas".split())
KEPT = CONDITIONS | set("enum const default examples".split())  # by `strict`, as they are


def is_simple(schema):
    """Whether `mismatches` understands all of a schema, at any depth."""
    if not isinstance(schema, dict):
        return False
    inner, known = [schema["items"]] if "items" in schema else [], SIMPLE
    if "properties" in schema:  # without them the other keywords of FIELDS are for jsonschema
        inner += schema["properties"].values()
        known = SIMPLE | FIELDS
    return (
        schema.keys() <= known
        and {*types_of(schema)} <= {*TYPES.values()}
        and isinstance(schema.get("enum", []), list)
        and all(map(is_simple, inner))
    )


def same(a, b):
    """Equality of JSON values: 1 is 1.0 but not true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def fits_format(value, name):
    """Whether a text or integer has the format that a schema names; unknown ones say nothing."""
    form = FORMATS.get(name)
    if isinstance(form, str) and isinstance(value, str):
        return bool(re.fullmatch(form, value, re.ASCII)) and (
            not name.startswith("date")
            or int(value[8:10]) <= monthrange(int(value[:4]) or 4, int(value[5:7]))[1]
        )
    if isinstance(form, int) and type(value) in (int, float):
        return -(1 << form - 1) <= value < 1 << form - 1
    return True


def mismatches(value, schema):
    """The keywords of a simple schema, read strictly, that the value breaks."""
    kinds, types = {TYPES[type(value)]}, types_of(schema)
    if kinds == {"integer"} or kinds == {"number"} and value.is_integer():
        kinds = {"integer", "number"}  # 3.0 is an integer
    if types and not kinds & {*types}:
        yield "type"
    if "const" in schema and not same(value, schema["const"]):
        yield "const"
    if "enum" in schema and not any(same(value, item) for item in schema["enum"]):
        yield "enum"
    if not fits_format(value, schema.get("format")):
        yield "format"
    for item in value if isinstance(value, list) else ():
        yield from mismatches(item, schema.get("items", {}))
    if isinstance(value, dict) and "properties" in schema:
        fields = schema["properties"]
        if value.keys() != fields.keys():
            yield "additionalProperties" if value.keys() > fields.keys() else "required"
        for name in [name for name in fields if name in value]:
            yield from mismatches(value[name], fields[name])


def strict(schema, whole, closed=True):
    """A copy for jsonschema with all declared properties required and, if closed, no other allowed.

    Where an object's properties stand in several parts (allOf, or anyOf beside properties), these
    stay open and the whole is closed. Conditions (if, not, contains) are left as they are.
    """
    if isinstance(schema, list):
        return [strict(item, whole, closed) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if not closed and "$ref" in schema:
        schema = {**resolve(schema["$ref"], whole), **schema}
        del schema["$ref"]
    own = "properties" in schema
    mixed, copy = PARTS if own else ("allOf",), {}
    for key, item in schema.items():
        copy[key] = item if key in KEPT else strict(item, whole, key not in mixed)
    if "type" in schema:
        copy["type"] = types_of(schema)
    if own:  # by name: a property may itself be called "properties"
        fields = schema["properties"].items()
        copy["properties"] = {name: strict(item, whole) for name, item in fields}
        copy["required"] = list(schema["properties"])
    if closed and (own or schema.keys() & {*mixed, *CONDITIONS}):
        if any("properties" in part for part in parts_of(schema, whole)):
            copy.pop("additionalProperties", None)
            copy["unevaluatedProperties"] = False
    return copy


@lru_cache(maxsize=1024)
def load_schema(text):
    """(schema, whether it is simple); ValueError for what cannot be applied here."""
    schema = json.loads(text)
    if not (simple := is_simple(schema)):
        require("jsonschema", "jsonschema", f"the schema {text:.200}")
        schema = strict(schema, schema)
        worker.run(check_schema, "jsonschema", schema)
    return schema, simple


def check_schema(schema):
    """In the helper: an error if a schema is none, or refers to something that is not in it."""
    import jsonschema
    import referencing.jsonschema

    jsonschema.Draft202012Validator.check_schema(schema)
    root = referencing.jsonschema.DRAFT202012.create_resource(schema)
    check_references(root, referencing.Registry().resolver_with_root(root))
    mismatch_fully(None, schema)  # does not return if the schema refers to itself alone


def check_references(part, resolver):
    resolver = resolver.in_subresource(part)
    if isinstance(part.contents, dict) and "$ref" in part.contents:
        resolver.lookup(part.contents["$ref"])
    for inner in part.subresources():
        check_references(inner, resolver)


def mismatch_fully(value, schema):
    """In the helper: the first keyword that the value breaks, of any schema. References are never
    fetched."""
    import jsonschema
    import referencing

    formats = jsonschema.FormatChecker(formats=())
    for name in FORMATS:
        formats.checks(name)(lambda value, name=name: fits_format(value, name))
    validator = jsonschema.Draft202012Validator(
        schema, registry=referencing.Registry(), format_checker=formats
    )
    error = next(validator.iter_errors(value), None)
    return error and error.validator


# ---- Verdicts ------------------------------------------------------------------------------------


def read_answer(row, message, schema):
    """The value of the document that the answer is; ValueError if it is none."""
    form, text = row.get("schema_type", "json"), message["content"].strip("\ufeff \t\r\n")
    if row.get("response_mode") == "tool_call":
        calls = [call["function"] for call in message["tool_calls"]]
        if len(calls) != 1 or row.get("tool_name") not in (None, calls[0]["name"]):
            raise ValueError("not one call of the tool")
        key, value = row.get("tool_payload_key"), calls[0]["arguments"]
        if key and set(value) != {key}:  # the other arguments of a tool are there to mislead
            raise ValueError("wrong arguments")
        value = value[key] if key else value
        as_text = isinstance(value, str) and "string" not in types_of(schema)
        return parse_json(value) if as_text else value  # the XML form of a call carries text
    if fenced := re.fullmatch(
        r"(`{3,}|~{3,})[ \t]*\w*[ \t]*(?:[^\n`]*\n|(?=[\[{<]))(.*?)\s*\1", text, re.DOTALL
    ):
        text = fenced[2]
    if form == "json" or len(text) > MAX_TEXT:
        return parse_json(text)
    return worker.run(*PARSERS[form], text, *([schema] if form == "xml" else []))


def verify_structured(row, message):
    """1 if the answer is one document of the asked format that fits the schema."""
    schema, simple = load_schema(row["schema_str"])
    try:
        value = read_answer(row, message, schema)
        json.dumps(value, allow_nan=False)  # 1e999 is an infinity, which parsers let pass
        if simple:
            broken = next(mismatches(value, schema), None)
        else:
            broken = worker.run(mismatch_fully, "jsonschema", value, schema)
    except TookTooLong:
        return Reward(0.0, "parsing took too long")
    except (ValueError, RecursionError) as error:
        return Reward(0.0, f"no valid document: {error}"[:100])
    return Reward(0.0, f"breaks schema: {broken}") if broken else Reward(1.0, "correct")


def check_schema_row(row):
    """ValueError unless schema, format and place are ones this machine can check."""
    form, mode = row.get("schema_type", "json"), row.get("response_mode", "text")
    if form not in {"json", *PARSERS} or mode not in ("text", "tool_call"):
        raise ValueError(f"schema_type {form!r} or response_mode {mode!r} is unknown")
    if mode != "tool_call" and form == "yaml":
        require("yaml", "PyYAML", "schema_type yaml")
    load_schema(row["schema_str"])
