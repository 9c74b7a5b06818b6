package demo

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// shortTTL is the validity of the X509-SVIDs while their rotation is shown. They are renewed at half of it.
const shortTTL = 5 * time.Second

// audience is what a JWT-SVID for the archive of the documents-service must be made out to.
const audience = "documents"

func (s *stage) caConfig() string {
	return fmt.Sprintf(`trust_domain: %s
listen: %s
data_dir: %q
admin_socket: {path: %q}
seal: {key_file: %q, create: true}
`, trustDomain, s.caAddr, filepath.Join(s.dir, "ca"), s.caSocket(), filepath.Join(s.dir, "seal.key"))
}

func (s *stage) agentConfig() string {
	return fmt.Sprintf(`trust_domain: %s
server_address: %s
data_dir: %q
socket_path: %q
join_token_file: %q
registration_wait: 100ms # how long a stranger is kept waiting before it is refused
`, trustDomain, s.caAddr, filepath.Join(s.dir, "agent"), filepath.Join(s.dir, "agent.sock"), filepath.Join(s.dir, "join.token"))
}

// documentFiles are the files that are applied in the course of the demo.
func (s *stage) documentFiles() map[string]string {
	return map[string]string{
		"identities.yaml":  s.identities(0),
		"short-lived.yaml": s.identities(shortTTL),
		"policy.yaml":      policyFile("/trusty-service"),
		"policy-open.yaml": policyFile("/trusty-service, /utility-service"),
		"policy-shadow.yaml": `kind: CallPolicy
name: quarantine
service: /documents-service
mode: shadow
allow:
  - from: [/trusty-service]
deny:
  - from: [/utility-service]
`,
	}
}

func (s *stage) identities(ttl time.Duration) string {
	var docs []string
	for _, name := range []string{Documents, Trusty, Utility} {
		doc := fmt.Sprintf("kind: Identity\nname: %s\nspiffeID: /%s\nmatch: [%q]\n", name, name, "unix:path:"+s.binary(name))
		if ttl != 0 {
			doc += fmt.Sprintf("x509TTL: %v\n", ttl)
		}
		docs = append(docs, doc)
	}
	return strings.Join(docs, "---\n")
}

func policyFile(readers string) string {
	return fmt.Sprintf(`kind: CallPolicy
name: documents
service: /documents-service
allow:
  - from: [%s]
    http: [{methods: [GET], paths: [/v1/documents/*]}]
  - from: [/trusty-service]
    http: [{methods: [GET], paths: [/v1/archive/*]}]
    jwt: {audience: [%s]}
  - from: [/trusty-service, /utility-service]
    http: [{methods: [GET], paths: [/v1/health]}]
`, readers, audience)
}
