package registry

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

// EntryID names a registration entry: 1 to 255 characters of A-Z a-z 0-9 . - _
type EntryID string

// Bounds of one registration entry. They keep a record far below the store's limit and a Follow message below gRPC's.
const (
	MaxEntryIDBytes  = 255
	MaxSelectors     = 64
	MaxDNSNames      = 64
	MaxFederatesWith = 64
	MaxHintBytes     = 1024 // Workload API §4: longer hints are not supported [WAPI-18]
	maxEntryBytes    = 64 << 10
)

// An Entry is a registration entry: processes whose selectors include all of Selectors, on nodes that descend from
// ParentID, hold SPIFFEID. An Entry in the registry is never changed in place.
type Entry struct {
	ID        EntryID
	SPIFFEID  spiffeid.ID
	ParentID  spiffeid.ID
	Selectors []spiffe.Selector // sorted, without repetition

	// OnNodes says which nodes may serve the entry when it comes from an Identity: those whose selectors include all
	// of On, or every attested node if On is empty. ParentID is then the ID of that group of nodes.
	OnNodes bool
	On      []spiffe.Selector

	X509TTL, JWTTTL time.Duration // 0: the CA's default
	FederatesWith   []spiffeid.TrustDomain
	DNSNames        []string
	Hint            string
	Admin           bool
	Downstream      bool
	StoreSVID       bool
	NoX509Prefetch  bool
	JWTIncludeJTI   bool
	Canary          bool      // nobody should ever hold it: who asks for it raises an alarm
	ExpiresAt       time.Time // zero: never
	CreatedAt       time.Time

	// Owner is the resource elsewhere that the entry belongs to, such as kubernetes/prod/spire/ClusterStaticEntry/web; empty: it
	// belongs to nobody, or to Identity.
	Owner string

	// Identity is the document that the entry stands for, if an operator wrote one.
	Identity *Document

	// Template is set in what stands for a templated Identity, which is no entry itself.
	Template *Template

	// Pod is set in an entry that a rule made for a pod, which is not stored. BesideEntries lets it have the SPIFFE ID of
	// registered entries that no Identity made, but of no admin's and no CA's.
	Pod           *Pod
	Rule          string
	BesideEntries bool

	// Revision is the store revision of the last change; 0 in an entry that has not been stored. Of an entry of a pod it is
	// the revision of its rule.
	Revision store.Revision
}

// A Document is what an operator applied.
type Document struct {
	Name    string
	Content []byte
	File    string
	Line    int

	// Owner is whose document it is: empty for operators, else a source such as "kubernetes/prod/resources". Nobody else's plan
	// changes or deletes it.
	Owner string
	// Definition is, of a document from a custom resource, the UID of the definition of its kind. Resources that are gone because
	// somebody deleted their definition are not taken for deleted ones.
	Definition string
}

// Expired tells whether the entry has ended at now.
func (e *Entry) Expired(now time.Time) bool { return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt) }

// alias tells whether the entry names a set of nodes instead of a workload. [SPIRE: parent is the server's ID]
func (e *Entry) alias() bool { return !e.OnNodes && e.ParentID.Path() == serverPath }

const (
	serverPath      = "/spire/server"
	agentPathPrefix = "/spire/agent/"
	// nodesPathPrefix holds the groups of nodes that Identities name with `on`. Nobody can attest or register there.
	nodesPathPrefix = "/spire/signet/nodes/"
	// identityPrefix starts the entry IDs that belong to Identities.
	identityPrefix = "identity."
)

// ServerID returns the ID of the CA of td.
func ServerID(td spiffeid.TrustDomain) spiffeid.ID { return mustID(td, serverPath) }

// AgentID returns the ID of an agent that attested by attestor as name. The name is a legal path segment.
func AgentID(td spiffeid.TrustDomain, attestor, name string) (spiffeid.ID, error) {
	return spiffeid.FromPath(td, agentPathPrefix+attestor+"/"+name)
}

// IsAgentID tells whether id lies where agents' IDs lie.
func IsAgentID(id spiffeid.ID) bool { return strings.HasPrefix(id.Path(), agentPathPrefix) }

// nodesID returns the ID that stands for the group of nodes whose selectors include all of on.
func nodesID(td spiffeid.TrustDomain, on []spiffe.Selector) spiffeid.ID {
	if len(on) == 0 {
		return mustID(td, nodesPathPrefix+"any")
	}
	h := sha256.New()
	for _, s := range on {
		h.Write([]byte(s.String()))
		h.Write([]byte{0})
	}
	return mustID(td, nodesPathPrefix+hex.EncodeToString(h.Sum(nil)[:16]))
}

// mustID is for constant paths, which are legal.
func mustID(td spiffeid.TrustDomain, path string) spiffeid.ID {
	id, err := spiffeid.FromPath(td, path)
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

// A ValidationError names the field that is wrong, its value and what it should be.
type ValidationError struct {
	Field, Value, Problem string
}

func (e *ValidationError) Error() string {
	if e.Value == "" {
		return fmt.Sprintf("%s: %s", e.Field, e.Problem)
	}
	return fmt.Sprintf("%s %q: %s", e.Field, clip(e.Value), e.Problem)
}

func clip(s string) string {
	const most = 256
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}

func invalid(field, value, format string, args ...any) error {
	return &ValidationError{field, value, fmt.Sprintf(format, args...)}
}

// normalise sorts what has no order, drops repetitions and maps a parent ID that holds a whole join token to the ID
// of the agent that attests with it, so that the secret is never stored. [DESIGN §4]
func (e *Entry) normalise() {
	e.Selectors = sortedSelectors(e.Selectors)
	e.On = sortedSelectors(e.On)
	e.FederatesWith = sortedTrustDomains(e.FederatesWith)
	e.ParentID = NormaliseAgentID(e.ParentID)
	if e.OnNodes && e.Template == nil {
		e.ParentID = nodesID(e.SPIFFEID.TrustDomain(), e.On)
	}
}

func sortedTrustDomains(tds []spiffeid.TrustDomain) []spiffeid.TrustDomain {
	tds = slices.Clone(tds)
	slices.SortFunc(tds, func(a, b spiffeid.TrustDomain) int { return strings.Compare(a.Name(), b.Name()) })
	return slices.Compact(tds)
}

func sortedSelectors(ss []spiffe.Selector) []spiffe.Selector {
	ss = slices.Clone(ss)
	slices.SortFunc(ss, func(a, b spiffe.Selector) int {
		if c := strings.Compare(a.Type, b.Type); c != 0 {
			return c
		}
		return strings.Compare(a.Value, b.Value)
	})
	return slices.Compact(ss)
}

// validate refuses what must not be registered in trust domain td. The entry has been normalised.
func (e *Entry) validate(td spiffeid.TrustDomain) error {
	if e.Template != nil {
		return e.validateTemplate(td)
	}
	if err := e.ID.Check(); err != nil {
		return err
	}
	if e.Pod == nil && strings.HasPrefix(string(e.ID), podEntryPrefix) {
		return invalid("id", string(e.ID), "IDs that begin with %s are those of pods, which nobody registers", podEntryPrefix)
	}
	if err := checkWorkloadID(td, "spiffe_id", e.SPIFFEID); err != nil {
		return err
	}
	switch {
	case e.ParentID.IsZero():
		return invalid("parent_id", "", "missing; name the agent or node alias that may serve the entry")
	case e.ParentID.TrustDomain() != td:
		return invalid("parent_id", e.ParentID.String(), "must be in trust domain %q", td.Name())
	case e.ParentID.Path() == "":
		return invalid("parent_id", e.ParentID.String(), "must have a path")
	case !e.OnNodes && strings.HasPrefix(e.ParentID.Path(), nodesPathPrefix):
		return invalid("parent_id", e.ParentID.String(), "is reserved for Identities; use kind: Identity with `on`")
	}
	if len(e.Selectors) == 0 {
		return invalid("selectors", "", "at least one is needed, such as unix:uid:1000; an entry without selectors would match every process")
	}
	if len(e.Selectors) > MaxSelectors || len(e.On) > MaxSelectors {
		return invalid("selectors", "", "at most %d are allowed, got %d", MaxSelectors, max(len(e.Selectors), len(e.On)))
	}
	for _, s := range slices.Concat(e.Selectors, e.On) {
		if _, err := spiffe.ParseSelector(s.String()); err != nil {
			return invalid("selectors", s.String(), "%v", err)
		}
	}
	if err := checkTTL("x509_svid_ttl", e.X509TTL); err != nil {
		return err
	}
	if err := checkTTL("jwt_svid_ttl", e.JWTTTL); err != nil {
		return err
	}
	if len(e.Hint) > MaxHintBytes {
		return invalid("hint", "", "at most %d bytes are allowed, got %d [WAPI-18]", MaxHintBytes, len(e.Hint))
	}
	if !printable(e.Hint) {
		return invalid("hint", e.Hint, "must be printable UTF-8")
	}
	if len(e.FederatesWith) > MaxFederatesWith {
		return invalid("federates_with", "", "at most %d are allowed, got %d", MaxFederatesWith, len(e.FederatesWith))
	}
	for _, f := range e.FederatesWith {
		if f == td {
			return invalid("federates_with", f.Name(), "is this trust domain itself [ID-24]")
		}
	}
	if len(e.DNSNames) > MaxDNSNames {
		return invalid("dns_names", "", "at most %d are allowed, got %d", MaxDNSNames, len(e.DNSNames))
	}
	for i, n := range e.DNSNames {
		if err := checkDNSName(n); err != nil {
			return err
		}
		if slices.Contains(e.DNSNames[:i], n) {
			return invalid("dns_names", n, "is named twice")
		}
	}
	if e.StoreSVID {
		if e.NoX509Prefetch {
			return invalid("store_svid", "true", "excludes disable_x509_svid_prefetch")
		}
		for _, s := range e.Selectors {
			if s.Type != e.Selectors[0].Type {
				return invalid("store_svid", "true", "needs all selectors of one type, got %q and %q", e.Selectors[0].Type, s.Type)
			}
		}
	}
	if e.alias() && (e.Admin || e.Downstream) {
		return invalid("parent_id", e.ParentID.String(), "makes this a node alias, which cannot be admin or downstream")
	}
	return nil
}

// Check says what is wrong with an entry ID.
func (id EntryID) Check() error {
	if id == "" || len(id) > MaxEntryIDBytes {
		return invalid("id", string(id), "must have 1 to %d characters", MaxEntryIDBytes)
	}
	for _, c := range []byte(id) {
		if !isNameByte(c) {
			return invalid("id", string(id), "may hold A-Z a-z 0-9 . - _ only")
		}
	}
	return nil
}

func isNameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_'
}

// checkWorkloadID refuses IDs that no workload may have: foreign, without a path, or reserved. [SPIRE-PROTOCOL §1]
func checkWorkloadID(td spiffeid.TrustDomain, field string, id spiffeid.ID) error {
	switch {
	case id.IsZero():
		return invalid(field, "", "missing")
	case id.TrustDomain() != td:
		return invalid(field, id.String(), "must be in trust domain %q", td.Name())
	case id.Path() == "":
		return invalid(field, id.String(), "must have a path: an ID without one names the trust domain itself [X509-07]")
	case id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/"):
		return invalid(field, id.String(), "everything at and below /spire is reserved")
	}
	if _, err := spiffe.ParseWorkloadID(id.String()); err != nil {
		return invalid(field, id.String(), "%v", err)
	}
	return nil
}

func checkTTL(field string, ttl time.Duration) error {
	if ttl < 0 {
		return invalid(field, ttl.String(), "must not be negative; 0 means the default")
	}
	if ttl%time.Second != 0 {
		return invalid(field, ttl.String(), "must be whole seconds")
	}
	return nil
}

func checkDNSName(n string) error {
	bad := func(why string) error { return invalid("dns_names", n, "%s", why) }
	if n == "" || len(n) > 253 {
		return bad("must have 1 to 253 characters")
	}
	if _, err := netip.ParseAddr(n); err == nil {
		return bad("is an IP address, not a DNS name")
	}
	for i, label := range strings.Split(n, ".") {
		if i == 0 && label == "*" && strings.Contains(n, ".") {
			continue
		}
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return bad("each label must have 1 to 63 characters and neither begin nor end with a hyphen")
		}
		for _, c := range []byte(label) {
			if c == '.' || !isNameByte(c) {
				return bad("labels may hold letters, digits, hyphens and underscores only")
			}
		}
	}
	return nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '\uFFFD' })
}

// similar is what makes two entries the same registration: ID, parent and selectors.
func (e *Entry) similar() string {
	var b strings.Builder
	b.WriteString(e.IDText())
	b.WriteByte(0)
	b.WriteString(e.ParentID.String())
	if e.Template != nil {
		fmt.Fprint(&b, selectorStrings(e.On))
	}
	for _, s := range e.Selectors {
		b.WriteByte(0)
		b.WriteString(s.Type)
		b.WriteByte(':')
		b.WriteString(s.Value)
	}
	return b.String()
}

// NewEntryID returns a random entry ID in the form of a UUID (version 4).
func NewEntryID() EntryID {
	var b [16]byte
	rand.Read(b[:]) // never fails since Go 1.24
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
	return EntryID(h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:])
}

// recordVersion is the version of every record this package stores. A record with a greater one was written by a newer
// CA, and this one refuses to start on it.
const recordVersion = 1

// ErrNewerFormat means that a stored record was written by a newer version of signet.
var ErrNewerFormat = errors.New("was written by a newer version of signet; upgrade this CA")

type entryRecord struct {
	V              int       `json:"v"`
	SPIFFEID       string    `json:"spiffe_id"`
	ParentID       string    `json:"parent_id"`
	Selectors      []string  `json:"selectors"`
	OnNodes        bool      `json:"on_nodes,omitempty"`
	On             []string  `json:"on,omitempty"`
	X509TTL        int64     `json:"x509_ttl,omitempty"` // seconds
	JWTTTL         int64     `json:"jwt_ttl,omitempty"`  // seconds
	FederatesWith  []string  `json:"federates_with,omitempty"`
	DNSNames       []string  `json:"dns_names,omitempty"`
	Hint           string    `json:"hint,omitempty"`
	Admin          bool      `json:"admin,omitempty"`
	Downstream     bool      `json:"downstream,omitempty"`
	StoreSVID      bool      `json:"store_svid,omitempty"`
	NoX509Prefetch bool      `json:"no_x509_prefetch,omitempty"`
	JWTIncludeJTI  bool      `json:"jwt_include_jti,omitempty"`
	Canary         bool      `json:"canary,omitempty"`
	ExpiresAt      int64     `json:"expires_at,omitempty"` // Unix seconds
	CreatedAt      int64     `json:"created_at"`           // Unix seconds
	Owner          string    `json:"owner,omitempty"`
	Identity       *document `json:"identity,omitempty"`
	Template       string    `json:"template,omitempty"` // of the path, in a templated Identity; its dns_names are templates too
}

type document struct {
	Name    string `json:"name"`
	Content string `json:"content"`
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"`

	Owner      string `json:"owner,omitempty"`
	Definition string `json:"definition,omitempty"`
}

func (e *Entry) encode() ([]byte, error) {
	r := entryRecord{
		V: recordVersion, SPIFFEID: e.SPIFFEID.String(), ParentID: e.ParentID.String(),
		Selectors: selectorStrings(e.Selectors), OnNodes: e.OnNodes, On: selectorStrings(e.On),
		X509TTL: int64(e.X509TTL / time.Second), JWTTTL: int64(e.JWTTTL / time.Second),
		DNSNames: e.DNSNames, Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream, StoreSVID: e.StoreSVID,
		NoX509Prefetch: e.NoX509Prefetch, JWTIncludeJTI: e.JWTIncludeJTI, Canary: e.Canary,
		ExpiresAt: unix(e.ExpiresAt), CreatedAt: unix(e.CreatedAt), Owner: e.Owner,
	}
	if e.Template != nil {
		r.V, r.SPIFFEID, r.ParentID, r.Template = templateRecordVersion, "", "", e.Template.Path.String()
	}
	for _, td := range e.FederatesWith {
		r.FederatesWith = append(r.FederatesWith, td.Name())
	}
	if d := e.Identity; d != nil {
		rec := d.document()
		r.Identity = &rec
	}
	b, err := json.Marshal(r)
	if err == nil && len(b) > maxEntryBytes {
		return nil, invalid("entry", string(e.ID), "has %d bytes as stored, at most %d are allowed", len(b), maxEntryBytes)
	}
	return b, err
}

func decodeEntry(id EntryID, item store.Item) (*Entry, error) {
	var r entryRecord
	if err := json.Unmarshal(item.Value, &r); err != nil {
		return nil, fmt.Errorf("record %s: %w (is the store damaged?)", item.Key, err)
	}
	if r.V > templateRecordVersion {
		return nil, fmt.Errorf("record %s of version %d: %w", item.Key, r.V, ErrNewerFormat)
	}
	if (r.V == templateRecordVersion) != (r.Template != "") {
		return nil, fmt.Errorf("record %s: version %d and template %q do not go together (is the store damaged?)", item.Key, r.V, clip(r.Template))
	}
	e := &Entry{
		ID: id, OnNodes: r.OnNodes, X509TTL: time.Duration(r.X509TTL) * time.Second, JWTTTL: time.Duration(r.JWTTTL) * time.Second,
		DNSNames: r.DNSNames, Hint: r.Hint, Admin: r.Admin, Downstream: r.Downstream, StoreSVID: r.StoreSVID,
		NoX509Prefetch: r.NoX509Prefetch, JWTIncludeJTI: r.JWTIncludeJTI, Canary: r.Canary,
		ExpiresAt: fromUnix(r.ExpiresAt), CreatedAt: fromUnix(r.CreatedAt), Revision: item.Modified, Owner: r.Owner,
	}
	var err error
	if e.Selectors, err = parseSelectors(r.Selectors); err != nil {
		return nil, fmt.Errorf("record %s: %w", item.Key, err)
	}
	if r.Template != "" {
		if e.Template, err = newTemplate(r.Template, r.DNSNames, e.Selectors); err != nil {
			return nil, fmt.Errorf("record %s: %w", item.Key, err)
		}
	} else {
		if e.SPIFFEID, err = spiffe.ParseWorkloadID(r.SPIFFEID); err != nil {
			return nil, fmt.Errorf("record %s: %w", item.Key, err)
		}
		if e.ParentID, err = spiffe.ParseWorkloadID(r.ParentID); err != nil {
			return nil, fmt.Errorf("record %s: %w", item.Key, err)
		}
	}
	if e.On, err = parseSelectors(r.On); err != nil {
		return nil, fmt.Errorf("record %s: %w", item.Key, err)
	}
	for _, n := range r.FederatesWith {
		td, err := spiffe.ParseTrustDomain(n)
		if err != nil {
			return nil, fmt.Errorf("record %s: %w", item.Key, err)
		}
		e.FederatesWith = append(e.FederatesWith, td)
	}
	if d := r.Identity; d != nil {
		doc := d.domain()
		e.Identity = &doc
	}
	return e, nil
}

// decodeRecord reads a stored JSON record and refuses one of a newer version.
func decodeRecord(item store.Item, into any, version func() int) error {
	if err := json.Unmarshal(item.Value, into); err != nil {
		return fmt.Errorf("record %s: %w (is the store damaged?)", item.Key, err)
	}
	if v := version(); v > recordVersion {
		return fmt.Errorf("record %s of version %d: %w", item.Key, v, ErrNewerFormat)
	}
	return nil
}

func selectorStrings(ss []spiffe.Selector) []string {
	if len(ss) == 0 {
		return nil
	}
	out := make([]string, len(ss))
	for i, s := range ss {
		out[i] = s.String()
	}
	return out
}

func parseSelectors(in []string) ([]spiffe.Selector, error) {
	var out []spiffe.Selector
	for _, s := range in {
		sel, err := spiffe.ParseSelector(s)
		if err != nil {
			return nil, err
		}
		out = append(out, sel)
	}
	return out, nil
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func fromUnix(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0).UTC()
}
