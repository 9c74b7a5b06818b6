package strictyaml

import (
	"encoding/json"
	"reflect"
	"strings"
)

// Schema returns the JSON Schema of documents that are decoded into the struct t, for editors and other checkers. Besides
// yaml, it reads the tags desc (a description), enum (the values, with commas), required ("true"), one (of the fields that have
// it, exactly one is given), empty ("ok": the list may have no items) and schema ("-": not in the schema).
func Schema(t reflect.Type, title string) ([]byte, error) {
	s := schemaOf(t)
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = title
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(data, '\n'), nil
}

func schemaOf(t reflect.Type) map[string]any {
	name, _, generic := strings.Cut(t.Name(), "[")
	switch {
	case generic && name == "Located":
		return schemaOf(t.Field(0).Type)
	case generic && name == "OneOrMany":
		one := schemaOf(t.Elem())
		return map[string]any{"oneOf": []any{one, map[string]any{"type": "array", "items": one, "minItems": 1}}}
	}
	switch t.Kind() {
	case reflect.Bool:
		return map[string]any{"type": "boolean"}
	case reflect.Slice:
		return map[string]any{"type": "array", "items": schemaOf(t.Elem()), "minItems": 1}
	case reflect.Map:
		return map[string]any{"type": "object", "additionalProperties": schemaOf(t.Elem()), "minProperties": 1}
	case reflect.Struct:
		return schemaOfStruct(t)
	default:
		return map[string]any{"type": "string"}
	}
}

func schemaOfStruct(t reflect.Type) map[string]any {
	properties, required := make(map[string]any), []string{}
	var one []any // of these, exactly one is given
	for i := range t.NumField() {
		tag := t.Field(i).Tag
		if tag.Get("schema") == "-" {
			continue
		}
		name := tag.Get("yaml")
		property := schemaOf(t.Field(i).Type)
		property["description"] = tag.Get("desc")
		if tag.Get("empty") == "ok" {
			delete(property, "minItems")
		}
		if values := tag.Get("enum"); values != "" {
			property["enum"] = strings.Split(values, ",")
		}
		if tag.Get("required") == "true" {
			required = append(required, name)
		}
		if tag.Get("one") != "" {
			one = append(one, map[string]any{"required": []string{name}})
		}
		properties[name] = property
	}
	s := map[string]any{"type": "object", "properties": properties, "additionalProperties": false}
	if len(required) > 0 {
		s["required"] = required
	} else {
		s["minProperties"] = 1
	}
	if one != nil {
		s["oneOf"] = one
	}
	if _, found := properties["grpc"]; found {
		s["not"] = map[string]any{"required": []string{"http", "grpc"}}
	}
	return s
}
