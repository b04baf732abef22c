package configfile

import "go.yaml.in/yaml/v4"

// Plain gives a configuration with the keys and the spelling of its file, to be
// shown to people.
func Plain(config any) any {
	text, err := yaml.Dump(config)
	if err != nil {
		return err.Error()
	}
	var out map[string]any
	if err := yaml.Load(text, &out); err != nil {
		return err.Error()
	}
	return out
}
