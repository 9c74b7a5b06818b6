package gcpiit

import (
	"net/url"
	"path/filepath"
	"time"

	"github.com/signet-id/signet/ca/nodeattest"
)

// Variables are those that a path template may name. ServiceAccount is the e-mail address with _ for @.
var Variables = []string{"PluginName", "ProjectID", "Zone", "InstanceID", "InstanceName", "ServiceAccount"}

const (
	// DefaultAudience is the audience of the tokens that SPIRE's agents ask for.
	DefaultAudience = "spire-gcp-node-attestor"
	// DefaultKeysURL is where Google publishes the keys of its identity tokens, as a JWK Set.
	DefaultKeysURL = "https://www.googleapis.com/oauth2/v3/certs"
)

// Config says whose instances may attest.
type Config struct {
	// Projects are the IDs of the projects whose instances are let in. One at least is needed.
	Projects []string
	// Audience is that of the tokens. Default spire-gcp-node-attestor, which SPIRE's agents ask for; one of your own, such
	// as spiffe://example.org, keeps tokens of other trust domains out.
	Audience string
	// KeysURL is where the keys that verify the tokens are fetched: an https URL that answers with a JWK Set, or with
	// certificates in PEM form by key ID. Default https://www.googleapis.com/oauth2/v3/certs.
	KeysURL string
	// KeysURLCAFile holds, in PEM form, the authorities that verify the server of KeysURL. Default: those of the system.
	KeysURLCAFile string
	// KeysFile is a file with such keys, for a CA that cannot reach KeysURL. It is read for each attestation. Excludes
	// KeysURL.
	KeysFile string
	// AllowReattestation lets an instance attest again with a token, also while its agent is at work. Then every process
	// that can ask the instance's metadata server can take the agent's place.
	AllowReattestation bool
	// Path makes the path of the agent's SPIFFE ID of Variables. Nil: /gcp_iit/<project>/<instance id>.
	Path *nodeattest.PathTemplate

	// Now tells the time. Nil: time.Now.
	Now func() time.Time
}

// Check tells each mistake by its field, without opening anything.
func (c Config) Check(bad func(field, format string, args ...any)) {
	if len(c.Projects) == 0 {
		bad("projects", "missing; list the IDs of the projects whose instances may attest")
	}
	for _, p := range c.Projects {
		if !isName(p) {
			bad("projects", "%q is not the ID of a project, such as my-project-1234", p)
		}
	}
	if c.KeysURL != "" {
		if u, err := url.Parse(c.KeysURL); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
			bad("keys_url", "%q is not an https URL", c.KeysURL)
		}
	}
	for _, f := range []struct{ field, path string }{{"keys_file", c.KeysFile}, {"keys_url_ca_file", c.KeysURLCAFile}} {
		if f.path != "" && !filepath.IsAbs(f.path) {
			bad(f.field, "%q must be absolute", f.path)
		}
	}
	if c.KeysFile != "" && (c.KeysURL != "" || c.KeysURLCAFile != "") {
		bad("keys_file", "excludes keys_url and keys_url_ca_file")
	}
}
