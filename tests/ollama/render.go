// Renders chat templates as Ollama does: Go's text/template with the values Ollama gives it.
// Reads a JSON list of {template, values} from standard input, writes a JSON list of texts.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type arguments map[string]any

func (a arguments) String() string { return marshal(a) }

type tool map[string]any

func (t tool) String() string { return marshal(t) }

type call struct {
	Function struct {
		Name      string
		Arguments arguments
	}
}

type message struct {
	Role, Content, Thinking string
	ToolCalls               []call
}

type values struct {
	System     string
	Messages   []*message
	Tools      []tool
	Think      bool
	IsThinkSet bool
}

func marshal(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func render(text string, v values) string {
	functions := template.FuncMap{"json": marshal}
	t, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(text)
	if err != nil {
		panic(err)
	}
	var out bytes.Buffer
	err = t.Execute(&out, map[string]any{
		"System": v.System, "Messages": v.Messages, "Tools": v.Tools, "Response": "",
		"Think": v.Think, "IsThinkSet": v.IsThinkSet,
	})
	if err != nil {
		panic(err)
	}
	return out.String()
}

func main() {
	var cases []struct {
		Template string
		Values   values
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, c := range cases {
		texts = append(texts, render(c.Template, c.Values))
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
