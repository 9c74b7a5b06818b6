package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	adminv1 "github.com/signet-id/signet/api/signet/admin/v1"
	"github.com/signet-id/signet/internal/strictyaml"
	"github.com/signet-id/signet/policy"
)

// A revocationPlan is what revoking would hit, or has hit.
type revocationPlan struct {
	Name     string      `json:"name"`
	Target   string      `json:"target"`
	Revision int64       `json:"revision,omitempty"` // 0: nothing was done
	IDs      int64       `json:"registered_ids_hit"`
	AllIDs   int64       `json:"registered_ids"`
	FirstIDs []string    `json:"first_ids,omitempty"`
	Agents   int64       `json:"agents_hit"`
	First    []string    `json:"first_agents,omitempty"`
	Admins   []string    `json:"admins_hit,omitempty"`
	Danger   string      `json:"danger,omitempty"`
	SVIDs    []knownSVID `json:"svids,omitempty"`
	More     bool        `json:"more_svids,omitempty"`
	Document string      `json:"document"`
}

type knownSVID struct {
	SPIFFEID   string `json:"spiffe_id"`
	Type       string `json:"type"`
	Serial     string `json:"serial_number,omitempty"`
	JTI        string `json:"jti,omitempty"`
	ObtainedBy string `json:"obtained_by"`
	IssuedAt   string `json:"issued_at"`
	ExpiresAt  string `json:"expires_at"`
}

// revokeFlags are what one revocation is made of.
type revokeFlags struct {
	id, serial, agent, jti, authority   string
	name, reason, expires, issuedBefore string
	yes, dryRun                         bool
}

func (a *app) revokeCommand() *cobra.Command {
	var f revokeFlags
	cmd := &cobra.Command{
		Use:   "revoke --id ID|--serial N|--agent ID|--jti JTI|--authority ID",
		Short: "Withdraw SVIDs before they expire: for IDs, serial numbers, stolen nodes, tokens, authorities",
		Long: `Withdraw SVIDs before they expire. It shows what is hit, applies a document of kind Revocation, and prints its name, by which
'signet unrevoke' lifts it again. Every connected agent has it within a moment; nothing is issued for a revoked ID any more.

--id            a SPIFFE ID or pattern, full or relative to the trust domain, read as wide as in a deny: /web, /ns/**. With
                --issued-before only what was issued until then is dead, and workloads get new SVIDs at once
--serial        an X509-SVID: its serial number in decimal, or in hexadecimal as openssl prints it (0x…, 01:ab:…, serial=01AB…)
--agent         a stolen node: it is banned, and all that it obtained is dead. Lifting the revocation does not lift the ban
--jti           a JWT-SVID that has a jti
--authority     an X.509 authority whose key was stolen: it leaves the bundle for good, and all that it signed is dead

What locks out an admin or hits much needs --yes.`,
		Example: `  signet revoke --id /payments --reason "key on a public host"
  signet revoke --id /payments --issued-before now
  signet revoke --serial "$(openssl x509 -in leaked.pem -noout -serial)" --expires 24h
  signet revoke --agent spiffe://example.org/spire/agent/join_token/abc`,
	}
	output := outputFlag(cmd)
	for _, flag := range []struct {
		into      *string
		name, use string
	}{
		{&f.id, "id", "SPIFFE ID or pattern"}, {&f.serial, "serial", "serial number of an X509-SVID"}, {&f.agent, "agent", "SPIFFE ID of an agent"},
		{&f.jti, "jti", "jti claim of a JWT-SVID"}, {&f.authority, "authority", "id of an X.509 authority"},
		{&f.name, "name", "name of the revocation (default: made up)"}, {&f.reason, "reason", "why, for people"},
		{&f.expires, "expires", "when it ends by itself: RFC 3339, or after how long, such as 24h (default: never)"},
		{&f.issuedBefore, "issued-before", "with --id: only what was issued before now, an RFC 3339 moment, or so long ago, such as 10m"},
	} {
		cmd.Flags().StringVar(flag.into, flag.name, "", flag.use)
	}
	cmd.Flags().BoolVar(&f.yes, "yes", false, "also if it hits much or locks out an admin, and for --authority, which cannot be undone")
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "only show what would be hit")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		doc, err := a.revocationDocument(f)
		if err != nil {
			return err
		}
		if f.authority != "" && !f.yes && !f.dryRun {
			return &usageError{err: fmt.Errorf("revoking authority %s cannot be undone: all X509-SVIDs that it signed are dead, and agents get new ones with their keys", f.authority),
				hint: "the same command with --yes, if that is meant; --dry-run shows what it signed"}
		}
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			return a.revoke(ctx, c, *output, f, doc)
		})
	}
	return a.reachesCA(cmd)
}

// revocationDocument writes the document that the flags stand for.
func (a *app) revocationDocument(f revokeFlags) (*adminv1.Document, error) {
	lines := []string{"kind: Revocation"}
	add := func(field, value string) {
		if value != "" {
			b, _ := json.Marshal(value) // a string always has a form in JSON, which is one in YAML
			lines = append(lines, field+": "+string(b))
		}
	}
	targets := 0
	kind := ""
	for _, t := range []struct{ name, value string }{{"id", f.id}, {"serial", f.serial}, {"agent", f.agent}, {"jti", f.jti}, {"authority", f.authority}} {
		if t.value != "" {
			targets++
			kind = t.name
		}
	}
	if targets != 1 {
		return nil, usagef("exactly one of --id, --serial, --agent, --jti and --authority says what is revoked")
	}
	if f.issuedBefore != "" && f.id == "" {
		return nil, usagef("--issued-before goes with --id")
	}
	if f.serial != "" {
		if _, err := policy.ParseSerial(f.serial); err != nil {
			return nil, usagef("--serial: %v", err)
		}
	}
	if f.name == "" {
		b := make([]byte, 4)
		rand.Read(b)
		f.name = fmt.Sprintf("%s-%s-%s", kind, strings.ToLower(a.now().UTC().Format("20060102t150405")), hex.EncodeToString(b))
	}
	add("name", f.name)
	add("id", f.id)
	add("serial", f.serial)
	add("agent", f.agent)
	add("jti", f.jti)
	add("authority", f.authority)
	add("reason", f.reason)
	if f.expires != "" {
		at, err := a.later("--expires", f.expires)
		if err != nil {
			return nil, err
		}
		add("expires", at)
	}
	if f.issuedBefore != "" {
		at := stamp(a.now())
		if f.issuedBefore != "now" {
			m, err := a.moment("--issued-before", f.issuedBefore)
			if err != nil {
				return nil, err
			}
			at = stamp(m.AsTime())
		}
		add("issuedBefore", at)
	}
	return &adminv1.Document{Content: []byte(strings.Join(lines, "\n") + "\n"), File: "signet revoke"}, nil
}

// later reads RFC 3339 or how long from now.
func (a *app) later(flag, s string) (string, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return stamp(t), nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return "", usagef("%s %q is neither a moment such as 2026-11-01T00:00:00Z nor a length of time such as 24h", flag, s)
	}
	return stamp(a.now().Add(d)), nil
}

func (a *app) revoke(ctx context.Context, c *caConn, output format, f revokeFlags, doc *adminv1.Document) error {
	preview, err := adminv1.NewRevocationsClient(c).PreviewRevocation(ctx, &adminv1.PreviewRevocationRequest{Document: doc})
	if err != nil {
		return caError("checking what is to be revoked", c, err)
	}
	p := planOfRevocation(doc, preview)
	if output == formatTable || output == formatWide {
		a.printReach(p)
	}
	if f.dryRun {
		return a.showRevocation(output, p)
	}
	if f.authority != "" {
		if err := a.revokeStolenAuthority(ctx, c, f.authority); err != nil {
			return err
		}
	}
	answer, err := adminv1.NewAdminClient(c).Apply(ctx, &adminv1.ApplyRequest{Documents: []*adminv1.Document{doc}, Yes: f.yes})
	if err != nil {
		err = caError("revoking", c, err)
		if isCode(err, codes.FailedPrecondition) {
			return withHint(err, "nothing was revoked; the same command with --yes, if that is meant")
		}
		return err
	}
	p.Revision = answer.GetRevision()
	return a.showRevocation(output, p)
}

// revokeStolenAuthority takes an authority out of the bundle, if it is one of the CA's.
func (a *app) revokeStolenAuthority(ctx context.Context, c *caConn, id string) error {
	canonical, err := policy.ParseAuthorityID(id)
	if err != nil {
		return usagef("--%v", err)
	}
	_, err = adminv1.NewAdminClient(c).RevokeAuthority(ctx, &adminv1.EndAuthorityRequest{Type: adminv1.AuthorityType_AUTHORITY_TYPE_X509, Id: canonical, Stolen: true})
	err = caError(fmt.Sprintf("revoking authority %s", canonical), c, err)
	switch {
	case isCode(err, codes.NotFound):
		a.note("the CA has no authority %s (any more); what it signed is revoked all the same", canonical)
		return nil
	case isCode(err, codes.FailedPrecondition):
		return withHint(err, "if it is the one that signs: 'signet authority prepare --type x509', then 'signet authority activate --force --type x509', then the same command again")
	}
	return err
}

func planOfRevocation(doc *adminv1.Document, m *adminv1.PreviewRevocationResponse) revocationPlan {
	p := revocationPlan{Target: m.GetTarget(), IDs: m.GetIds(), AllIDs: m.GetRegisteredIds(), FirstIDs: m.GetFirstIds(), Agents: m.GetAgents(), First: m.GetFirstAgents(),
		Admins: m.GetAdmins(), Danger: m.GetDanger(), More: m.GetMoreSvids(), Document: string(doc.GetContent())}
	if docs, err := strictyaml.Split(doc.GetContent(), doc.GetFile(), 1); err == nil && len(docs) == 1 {
		p.Name, _, _, _ = docs[0].Field("name")
	}
	for _, s := range m.GetSvids() {
		p.SVIDs = append(p.SVIDs, knownSVID{s.GetSpiffeId(), s.GetType(), s.GetSerialNumber(), s.GetJti(), s.GetObtainedBy(), stamp(s.GetIssuedAt().AsTime()), stamp(s.GetExpiresAt().AsTime())})
	}
	return p
}

// shownHit is how many of each kind are named to people.
const shownHit = 5

// printReach tells the person at the terminal whom it hits.
func (a *app) printReach(p revocationPlan) {
	a.note("this revokes %s", p.Target)
	list := func(what string, n int64, names []string) {
		if n == 0 {
			return
		}
		text := strings.Join(names[:min(len(names), shownHit)], ", ")
		if more := n - int64(min(len(names), shownHit)); more > 0 {
			text += fmt.Sprintf(" and %d more", more)
		}
		a.note("it hits %s: %s", what, text)
	}
	list(fmt.Sprintf("%d of %d registered IDs", p.IDs, p.AllIDs), p.IDs, p.FirstIDs)
	list(count(int(p.Agents), "agent"), p.Agents, p.First)
	list(count(len(p.Admins), "admin"), int64(len(p.Admins)), p.Admins)
	for i, s := range p.SVIDs {
		if i == shownHit {
			break
		}
		a.note("it hits the %s-SVID of %s that %s obtained at %s and that ends at %s", s.Type, s.SPIFFEID, s.ObtainedBy, s.IssuedAt, s.ExpiresAt)
	}
	switch more := len(p.SVIDs) - shownHit; {
	case p.More:
		a.note("and more of them than this CA's audit log was searched for")
	case more > 0:
		a.note("and %d more SVIDs that this CA issued and that have not ended", more)
	case len(p.SVIDs) == 0:
		a.note("this CA's audit log has no SVID that it hits and that has not ended")
	}
}

func (a *app) showRevocation(output format, p revocationPlan) error {
	if output == formatJSON || output == formatYAML {
		return a.show(output, p, nil)
	}
	if p.Revision == 0 {
		a.note("nothing was revoked (--dry-run)")
		return nil
	}
	a.note("revoked at revision %d; 'signet unrevoke %s' lifts it", p.Revision, p.Name)
	_, err := fmt.Fprintln(a.stdout, escape(p.Name))
	return err
}

func (a *app) unrevokeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "unrevoke NAME...",
		Short: "Lift revocations",
		Long: `Lift revocations: the same as 'signet delete revocation NAME'. What was revoked and has not expired is good again. The ban of a revoked
agent stays, and so does the end of a revoked authority.`,
		Example: "  signet unrevoke id-20261101t120000-0a1b2c3d",
		Args:    someArgs("NAME"),
	}
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			client := adminv1.NewAdminClient(c)
			for _, name := range names {
				was, err := client.GetResources(ctx, &adminv1.GetResourcesRequest{Kind: policy.KindRevocation, Name: name})
				if err == nil {
					var answer *adminv1.DeleteResourceResponse
					if answer, err = client.DeleteResource(ctx, &adminv1.DeleteResourceRequest{Kind: policy.KindRevocation, Name: name}); err == nil {
						fmt.Fprintf(a.stdout, "lifted %s at revision %d\n", escape(name), answer.GetRevision())
					}
				}
				if err != nil {
					return resourceHint(policy.KindRevocation, caError(fmt.Sprintf("lifting revocation %q", name), c, err))
				}
				for _, r := range was.GetResources() {
					if field, value := revocationTarget(r.GetDocument()); field == "agent" {
						a.note("the agent is still banned; 'signet agent unban %s' lifts that", value)
					}
				}
			}
			return nil
		})
	}
	return a.reachesCA(cmd)
}

// revocationTarget reads what a stored Revocation is about.
func revocationTarget(d *adminv1.Document) (field, value string) {
	docs, err := strictyaml.Split(d.GetContent(), d.GetFile(), 1)
	if err != nil || len(docs) != 1 {
		return "", ""
	}
	for _, field := range []string{"id", "serial", "agent", "jti", "authority"} {
		if value, _, _, ok := docs[0].Field(field); ok {
			return field, value
		}
	}
	return "", ""
}

// revocationField reads one field of a stored Revocation; empty if it does not have it.
func revocationField(document, field string) string {
	docs, err := strictyaml.Split([]byte(document), "", 1)
	if err != nil || len(docs) != 1 {
		return ""
	}
	value, _, _, _ := docs[0].Field(field)
	return value
}
