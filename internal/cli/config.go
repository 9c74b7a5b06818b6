package cli

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/agent"
	"github.com/signet-id/signet/ca"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/internal/cli/daemon"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
	"github.com/signet-id/signet/policy/proxy"
	"github.com/signet-id/signet/spiffe"
)

func (a *app) configCommand() *cobra.Command {
	return a.noun("config", "Configuration files", "", a.configCheckCommand())
}

func (a *app) configCheckCommand() *cobra.Command {
	var trustDomain string
	cmd := &cobra.Command{
		Use:   "check FILE...",
		Short: "Check configuration files and documents without starting anything",
		Long: `Check the configuration of a CA, an agent or a proxy, or documents for 'signet apply'; which of them a file is shows from its keys. Mistakes
are reported with file, line and column. Files that the configuration names are not opened.`,
		Example: `  signet config check /etc/signet/ca.yaml
  signet config check policies/*.yaml --trust-domain example.org`,
		Args: someArgs("FILE"),
	}
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "", "for documents: the trust domain they are written for")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		td := spiffeid.TrustDomain{}
		if trustDomain != "" {
			var err error
			if td, err = spiffe.ParseTrustDomain(trustDomain); err != nil {
				return usagef("--trust-domain: %w", err)
			}
		}
		var mistakes []error
		for _, file := range args {
			what, err := a.checkConfig(file, td)
			if err != nil {
				var usage *usageError
				if errors.As(err, &usage) {
					return err
				}
				mistakes = append(mistakes, err)
				continue
			}
			fmt.Fprintf(a.stdout, "%s: %s\n", escape(inputName(file)), what)
		}
		return errors.Join(mistakes...)
	}
	return cmd
}

// checkConfig checks one file and says what it is.
func (a *app) checkConfig(file string, td spiffeid.TrustDomain) (string, error) {
	data, err := a.readInput(file, maxDocuments)
	if err != nil {
		return "", err
	}
	docs, err := strictyaml.Split(data, inputName(file), 1)
	if err != nil {
		return "", err
	}
	if len(docs) == 0 {
		return "", fmt.Errorf("%s: there is nothing in it", inputName(file))
	}
	if _, _, _, ok := docs[0].Field("kind"); ok {
		return a.checkDocuments(docs, td)
	}
	if len(data) > daemon.MaxConfigBytes {
		return "", fmt.Errorf("%s: a configuration has at most %d bytes", inputName(file), daemon.MaxConfigBytes)
	}
	what, check := "configuration of a CA", func() error { _, err := ca.ReadConfig(data, inputName(file)); return err }
	switch {
	case hasKey(docs[0], "inbound"), hasKey(docs[0], "outbound"):
		what, check = "configuration of a proxy", func() error { _, err := proxy.ReadConfig(data, inputName(file)); return err }
	case looksLikeAgent(docs[0]):
		what, check = "configuration of an agent", func() error { _, err := agent.ReadConfig(data, inputName(file)); return err }
	}
	if err := check(); err != nil {
		return "", fmt.Errorf("%s, read as the %s: %w", inputName(file), what, err)
	}
	return what + ", correct", nil
}

// hasKey says whether a document has a key at its top.
func hasKey(doc strictyaml.Document, key string) bool {
	for i := 0; i+1 < len(doc.Node.Content); i += 2 {
		if doc.Node.Content[i].Value == key {
			return true
		}
	}
	return false
}

// looksLikeAgent tells by the keys that only one of the two configurations has.
func looksLikeAgent(doc strictyaml.Document) bool {
	caKeys, agentKeys := configKeys(ca.Config{}), configKeys(agent.Config{})
	score := 0
	for i := 0; i+1 < len(doc.Node.Content); i += 2 {
		key := doc.Node.Content[i].Value
		if agentKeys[key] && !caKeys[key] {
			score++
		}
		if caKeys[key] && !agentKeys[key] {
			score--
		}
	}
	return score > 0
}

// configKeys are the top-level keys of a configuration.
func configKeys(config any) map[string]bool {
	keys := map[string]bool{}
	t := reflect.TypeOf(config)
	for i := range t.NumField() {
		if name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ","); name != "" && name != "-" {
			keys[name] = true
		}
	}
	return keys
}

// checkDocuments checks what apply would, as far as it does not depend on what the CA holds.
func (a *app) checkDocuments(docs []strictyaml.Document, td spiffeid.TrustDomain) (string, error) {
	if td.IsZero() {
		for _, doc := range docs {
			if kind, _, _, _ := doc.Field("kind"); kind != policy.KindPolicyTest {
				return "", &usageError{err: fmt.Errorf("--trust-domain is missing: %s holds documents, and they are written for one", docs[0].File),
					hint: "for example: signet config check " + docs[0].File + " --trust-domain example.org"}
			}
		}
	}
	var mistakes []error
	for _, doc := range docs {
		var err error
		switch kind, _, _, _ := doc.Field("kind"); kind { // others all at once, below
		case policy.KindPolicyTest:
			_, err = policy.ParseTests(doc)
		case registry.KindIdentity:
			_, err = registry.ParseIdentity(doc, td)
		}
		if err != nil {
			mistakes = append(mistakes, err)
		}
	}
	if !td.IsZero() {
		if _, err := compileDocuments(docs, td); err != nil {
			mistakes = append(mistakes, err)
		}
	}
	if err := errors.Join(append(mistakes, checkTwice(docs))...); err != nil {
		return "", err
	}
	return count(len(docs), "document") + ", correct", nil
}
