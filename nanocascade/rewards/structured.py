"""Structured output: the answer is one document that fits the row's JSON schema.

Where: the whole answer, alone or in one ``` fence, or (response_mode "tool_call") the argument
`tool_payload_key` of the only call, to `tool_name`. As in NeMo Gym, schemas are read strictly:
every declared property is required and no other allowed.

Refused, because readers differ on what they mean or because they explode: a key that comes twice,
NaN and infinities, YAML aliases, XML with a DOCTYPE or attributes. The helper process parses what
is not JSON and, with jsonschema (extra), checks schemas of more than types, fields and constants:
their patterns may backtrack without end.
"""

import functools
import json
import re
import tomllib
from calendar import monthrange
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
SIMPLE = {
    "type",
    "items",
    "enum",
    "const",  # what `mismatch` knows, and what decides nothing
    "title",
    "description",
    "default",
    "examples",
    "format",
    "nullable",
    "$schema",
}
VALUES = ("enum", "const", "default", "examples")  # these keywords hold no schemas
CONDITIONS = {"if", "then", "else", "not", "contains", "propertyNames", "dependentSchemas"}
PARTS, KEPT = {"allOf", "anyOf", "oneOf"}, {*VALUES, *CONDITIONS}


DATE = r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)"
FORMATS = {  # `format` of texts, as patterns, and of integers, as a number of bits
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}[Tt ]{TIME}",
    "email": r"[^@\s]+@[^@\s]+",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]*",
    "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!$)|$)){4}",
    "int32": 32,
    "int64": 64,
}


def fits_format(value, name):
    """Whether a text or integer has the format that a schema names; unknown ones say nothing."""
    form = FORMATS.get(name)
    if isinstance(form, str) and isinstance(value, str):
        return bool(re.fullmatch(form, value)) and (
            name != "date" or int(value[8:]) <= monthrange(int(value[:4]) or 4, int(value[5:7]))[1]
        )
    if isinstance(form, int) and type(value) in (int, float):
        return -(1 << form - 1) <= value < 1 << form - 1
    return True


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


YAML_FORMS = {  # of YAML 1.2: `on` and 2024-05-10 are texts, 007 is 7, 1e3 a number
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", float),
}


def parse_yaml(text):
    """By the safe loader, without aliases and without tags: a !!set is no JSON value."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}

        def construct_mapping(self, node, deep=False):
            pairs = [[self.construct_object(x, True) for x in pair] for pair in node.value]
            return distinct([(key if isinstance(key, str) else str(key), x) for key, x in pairs])

    for name, (form, convert) in YAML_FORMS.items():
        tag = f"tag:yaml.org,2002:{name}"
        Loader.add_implicit_resolver(tag, re.compile(f"(?:{form})$"), None)
        Loader.add_constructor(tag, lambda self, node, convert=convert: convert(node.value))
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            refuse("an alias or a tag")
    return yaml.load(text, Loader)


def fields_of(schema, root):
    """(types, {field: schema}, the items' schema, listed values) of what a schema of `root` allows,
    in what it refers to and in its alternatives as well: {"anyOf": [{"type": ["null"]}, {"enum":
    ["a"]}]} -> ["null", "string"], {}, {}, ["a"]."""
    if not isinstance(schema, dict):
        return [], {}, {}, []
    values = schema.get("enum", []) + [schema[key] for key in ("const",) if key in schema]
    kinds = schema.get("type") or [TYPES[type(value)] for value in values]
    fields, items = schema.get("properties", {}), schema.get("items", {})
    parts = [x for key in ("allOf", "anyOf", "oneOf") for x in schema.get(key, [])]
    if schema.get("$ref", "").startswith("#/"):  # "#/$defs/pet"
        parts.append(resolve(schema["$ref"], root))
    for more, named, inner, listed in (fields_of(part, root) for part in parts):
        kinds, fields, items = [*kinds, *more], named | fields, items or inner
        values = values + listed
    return kinds, fields, items, values


NIL = "{http://www.w3.org/2001/XMLSchema-instance}nil"


def parse_xml(text, schema):
    """The root's value, or {root: value} if the schema names the root: else it only wraps."""
    # Without a DOCTYPE there are no entities to expand.
    root = refuse("a DOCTYPE") if "<!DOCTYPE" in text else ElementTree.fromstring(text)
    for element in root.iter():
        between = [element.text, *(child.tail for child in element)] if len(element) else []
        if {*element.attrib} - {NIL} or "".join(part or "" for part in between).strip():
            refuse("an attribute or text between elements")
    named = set(fields_of(schema, schema)[1]) == {root.tag}
    return xml_fields([root], schema, schema) if named else xml_value([root], schema, schema)


def xml_fields(elements, schema, whole):
    groups, fields = {}, fields_of(schema, whole)[1]
    for element in elements:
        groups.setdefault(element.tag, []).append(element)
    return {name: xml_value(group, fields.get(name, {}), whole) for name, group in groups.items()}


def xml_value(elements, schema, whole):
    """What elements of one name hold, as the type that the schema names, since XML has none.

    <n>7</n> -> 7; <t>a</t><t>b</t> and <t><x>a</x><x>b</x></t> -> ["a", "b"], unless items have a
    field x: then the latter is one of them.
    """
    (kinds, _, items, listed), first = fields_of(schema, whole), elements[0]
    text, inner = (first.text or "").strip(), {child.tag for child in first}
    if "array" in kinds and not (text and "string" in kinds):
        wrapped = len(elements) == 1 and len(inner) < 2 and not text
        wrapped = wrapped and not inner & {*fields_of(items, whole)[1]}
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
        if known and re.fullmatch(form, text):
            value = convert(text)
            return text if texts and kind not in kinds else value
    return text  # the schema will object to it


XML_FORMS = [  # as XML Schema writes them
    ("boolean", "true|false|True|False|1|0", lambda text: text.lower() in ("true", "1")),
    ("integer", r"[+-]?\d{1,400}", int),
    ("number", r"[+-]?(?:\d{1,400}\.?\d{0,400}|\.\d{1,400})(?:[eE][+-]?\d{1,4})?", float),
]

PARSERS = {  # format -> (function for the helper process, the module it needs)
    "yaml": (parse_yaml, "yaml"),
    "toml": (tomllib.loads, "tomllib"),  # takes quadratic time on dotted keys
    "xml": (parse_xml, "xml.etree.ElementTree"),
}


def strict(schema, whole=None, closed=True):
    """A copy with all declared properties required and no other allowed; "type" is a list.

    Where an object's properties stand in several parts (allOf, or anyOf beside properties), these
    stay open and the whole is closed. Conditions (if, not, contains) are left as they are.
    """
    whole = schema if whole is None else whole
    if isinstance(schema, list):
        return [strict(item, whole, closed) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if not closed and "$ref" in schema:
        schema = {**resolve(schema["$ref"], whole), **schema}
        del schema["$ref"]
    copy = {key: item if key in KEPT else strict(item, whole) for key, item in schema.items()}
    kind = copy.get("type")
    if kind is not None:
        copy["type"] = [kind] if isinstance(kind, str) else [*kind]
        if schema.get("nullable") is True:  # OpenAPI
            copy["type"].append("null")
    mixed = PARTS & schema.keys() if "properties" in schema else {"allOf"} & schema.keys()
    for key in mixed:
        copy[key] = [strict(item, whole, False) for item in schema[key]]
    if "properties" in schema:  # by name: a property may itself be called "properties"
        fields = schema["properties"].items()
        copy["properties"] = {name: strict(item, whole) for name, item in fields}
        copy["required"] = list(schema["properties"])
    if closed and (mixed or CONDITIONS & schema.keys()) and fields_of(schema, whole)[1]:
        copy.pop("additionalProperties", None)
        copy["unevaluatedProperties"] = False
    elif closed and "properties" in schema:
        copy["additionalProperties"] = False
    return copy


def resolve(reference, whole):
    """What a reference into the schema itself leads to."""
    start, *path = reference.split("/")
    if start != "#":
        raise ValueError(f"the reference {reference!r} leads out of the schema")
    step = lambda x, key: x[int(key)] if isinstance(x, list) else x.get(key, {})  # noqa: E731
    return functools.reduce(step, path, whole)


def is_simple(schema):
    """Whether `mismatch` understands all of a strict schema, at any depth."""
    if not isinstance(schema, dict):
        return False
    inner, known = [schema["items"]] if "items" in schema else [], SIMPLE
    if "properties" in schema:  # without them these keywords are for jsonschema
        inner += schema["properties"].values()
        known = SIMPLE | {"properties", "required", "additionalProperties"}
    return (
        schema.keys() <= known
        and {*schema.get("type", ())} <= {*TYPES.values()}
        and isinstance(schema.get("enum", []), list)
        and all(map(is_simple, inner))
    )


@functools.lru_cache(maxsize=1024)
def load_schema(text):
    """(strict schema, whether it is simple); ValueError for what cannot be applied here."""
    schema = strict(json.loads(text))
    if not (simple := is_simple(schema)):
        require("jsonschema", "jsonschema", f"the schema {text:.200}")
        worker.run(mismatch_fully, "jsonschema", None, schema)  # raises if it is no schema
        worker.run(find_references, "jsonschema", schema)  # and for one that leads nowhere
    return schema, simple


def same(a, b):
    """Equality of JSON values: 1 is 1.0 but not true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def mismatch(value, schema):
    """The first keyword of a simple schema that the value breaks, or None."""
    kind = TYPES[type(value)]
    whole = kind == "integer" or (kind == "number" and value.is_integer())  # 3.0 is an integer
    if not {kind, *(("integer", "number") if whole else ())} & {*schema.get("type", [kind])}:
        return "type"
    for key, allowed in (("const", [schema.get("const", value)]), ("enum", schema.get("enum"))):
        if allowed is not None and not any(same(value, item) for item in allowed):
            return key
    if not fits_format(value, schema.get("format")):
        return "format"
    inner = [(item, schema.get("items", {})) for item in value] if kind == "array" else []
    if kind == "object" and (fields := schema.get("properties")) is not None:
        if value.keys() != fields.keys():
            return "additionalProperties" if value.keys() > fields.keys() else "required"
        inner = [(value[name], fields[name]) for name in fields]
    return next((broken for pair in inner if (broken := mismatch(*pair))), None)


def mismatch_fully(value, schema):
    """`mismatch` for every keyword there is, in the helper. References are never fetched."""
    import jsonschema
    import referencing

    jsonschema.Draft202012Validator.check_schema(schema)
    formats = jsonschema.FormatChecker(formats=())
    for name in FORMATS:
        formats.checks(name)(lambda value, name=name: fits_format(value, name))
    validator = jsonschema.Draft202012Validator(
        schema, registry=referencing.Registry(), format_checker=formats
    )
    error = next(validator.iter_errors(value), None)
    return error and error.validator


def references(schema):
    """All that a schema refers to, at any depth."""
    inner = schema if isinstance(schema, list) else []
    if isinstance(schema, dict):
        inner = [
            item
            for key, item in schema.items()
            if key not in VALUES and not (isinstance(item, dict) and "$id" in item)
        ]  # with a root of its own
        yield from (x for x in [schema.get("$ref")] if isinstance(x, str))
    for item in inner:
        yield from references(item)


def find_references(schema):
    """In the helper: an error for one that is not in the schema itself."""
    import referencing.jsonschema

    root = referencing.jsonschema.DRAFT202012.create_resource(schema)
    for name in references(schema):
        referencing.Registry().resolver_with_root(root).lookup(name)


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
        as_text = isinstance(value, str) and "string" not in schema.get("type", ())
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
        broken = (
            mismatch(value, schema)
            if simple
            else worker.run(mismatch_fully, "jsonschema", value, schema)
        )
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
