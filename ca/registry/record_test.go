package registry

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/signet-id/signet/api/signet/policy/v1"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

var update = flag.Bool("update", false, "write the golden records of the present version")

// golden holds one record of each kind as version 1 stores it. The files stay when a version 2 comes: every later
// version must read them.
func golden() map[string]any {
	id := func(p string) spiffeid.ID { return spiffeid.RequireFromPath(td, p) }
	at := time.Unix(1795320000, 0).UTC()
	return map[string]any{
		"entry/identity.web": &Entry{ID: "identity.web", SPIFFEID: id("/web"), ParentID: nodesID(td, []spiffe.Selector{sel("node:group:b")}), OnNodes: true, On: []spiffe.Selector{sel("node:group:b")},
			Selectors: []spiffe.Selector{sel("unix:uid:1")}, X509TTL: time.Hour, JWTTTL: time.Minute, FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("partner.example")},
			DNSNames: []string{"web.internal"}, Hint: "h", JWTIncludeJTI: true, ExpiresAt: at.Add(time.Hour), CreatedAt: at, Identity: &Document{Name: "web", Content: []byte("kind: Identity\n"), File: "f.yaml", Line: 3}},
		"entry/plain": &Entry{ID: "plain", SPIFFEID: id("/p"), ParentID: id("/spire/agent/join_token/x"), Selectors: []spiffe.Selector{sel("unix:path:/bin/a"), sel("unix:uid:1")},
			Admin: true, Downstream: true, StoreSVID: true, NoX509Prefetch: true, CreatedAt: at},
		"entry/identity.cluster-default": templated(),
		"entry/owned":                    &Entry{ID: "owned", SPIFFEID: id("/p"), ParentID: id("/spire/agent/join_token/x"), Selectors: []spiffe.Selector{sel("unix:uid:2")}, CreatedAt: at, Owner: "kubernetes/prod/spire/ClusterStaticEntry/web"},
		"node/join_token/x": &Node{ID: id("/spire/agent/join_token/x"), Attestation: "join_token", Selectors: []spiffe.Selector{sel("node:group:b")}, Serial: "1", NewSerial: "2", ExpiresAt: at,
			NewExpiresAt: at.Add(time.Hour), Key: []byte{1}, NewKey: []byte{2}, Active: true, Banned: true, CanReattest: true, Version: "0.1", CreatedAt: at},
		"federation/partner.example": &Federation{TrustDomain: spiffeid.RequireTrustDomainFromString("partner.example"), URL: "https://10.1.2.3:8443/", Profile: ProfileSPIFFE,
			EndpointID: spiffeid.RequireFromString("spiffe://partner.example/bundle"), CreatedAt: at, Document: &Document{Name: "partner", Content: []byte("kind: Federation\n"), File: "f.yaml", Line: 9}, Initial: "00ff"},
		"federation/second.example": &Federation{TrustDomain: spiffeid.RequireTrustDomainFromString("second.example"), URL: "https://second.example/", Profile: ProfileWeb, CreatedAt: at},
		"ack/join_token/x":          &Ack{Authorities: []string{"a1", "k1"}, At: at},
		"token/x":                   &Token{ID: "x", SecretHash: []byte{1, 2}, ExpiresAt: at, Groups: []string{"b"}, UsedBy: []byte{3}},
	}
}

// templated is a templated Identity, whose record has version 2.
func templated() *Entry {
	match := []spiffe.Selector{sel("k8s:container-name:web"), sel("k8s:ns:shop")}
	t, err := newTemplate("/ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }}", []string{"{{ .k8s.sa }}.internal"}, match)
	if err != nil {
		panic(err)
	}
	return &Entry{ID: "identity.cluster-default", Template: t, OnNodes: true, On: []spiffe.Selector{sel("k8s_psat:cluster:prod")}, Selectors: match, DNSNames: []string{"{{ .k8s.sa }}.internal"},
		X509TTL: time.Hour, JWTIncludeJTI: true, CreatedAt: time.Unix(1795320000, 0).UTC(), Identity: &Document{Name: "cluster-default", Content: []byte("kind: Identity\n"), File: "f.yaml", Line: 9}}
}

func encodeAny(v any) ([]byte, error) {
	switch v := v.(type) {
	case *Entry:
		return v.encode()
	case *Node:
		return v.encode()
	case *Token:
		return v.encode()
	case *Ack:
		return v.encode()
	case *Federation:
		return v.encode()
	}
	return nil, errors.New("unknown kind")
}

func TestRecordsOfVersion1AreRead(t *testing.T) {
	for key, want := range golden() {
		file := filepath.Join("testdata", "records-v1", strings.ReplaceAll(key, "/", "_")+".json")
		now, err := encodeAny(want)
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			os.MkdirAll(filepath.Dir(file), 0o755)
			if err := os.WriteFile(file, append(now, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		stored, err := os.ReadFile(file)
		if err != nil {
			t.Fatalf("%s: %v (run with -update once)", key, err)
		}
		if strings.TrimSpace(string(stored)) != string(now) {
			t.Errorf("%s is written as\n%s\nbut version 1 is\n%s", key, now, stored)
		}
		item := store.Item{Key: key, Value: stored}
		kind, name, _ := strings.Cut(key, "/")
		var got any
		switch kind {
		case "entry":
			got, err = decodeEntry(EntryID(name), item)
		case "node":
			got, err = decodeNode(want.(*Node).ID, item)
		case "token":
			got, err = decodeToken(name, item)
		case "ack":
			got, err = decodeAck(item)
		case "federation":
			got, err = decodeFederation(want.(*Federation).TrustDomain, item)
		}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s reads as\n%+v\nwant\n%+v (%v)", key, got, want, err)
		}
	}
}

func TestPolicyRecordRoundTrip(t *testing.T) {
	p := &policyv1.Policy{Name: "p", Services: []string{"spiffe://example.org/web"}, Mode: policyv1.Mode_MODE_ENFORCE}
	b, err := (&resource{kind: KindCallPolicy, name: "p", doc: Document{Name: "p", Content: []byte("kind: CallPolicy\n")}, compiled: p}).encode(time.Unix(5, 0))
	if err != nil {
		t.Fatal(err)
	}
	ix := newIndex()
	if err := ix.apply(td, store.Event{Item: store.Item{Key: "policy/p", Value: b, Modified: 7}}, nil); err != nil {
		t.Fatal(err)
	}
	p.Revision = 7
	if got := ix.policies["p"]; !proto.Equal(got.Compiled, p) || string(got.Document.Content) != "kind: CallPolicy\n" || got.CreatedAt.Unix() != 5 {
		t.Errorf("read back: %+v", got)
	}
}

// TestNewerRecordsAreRefused: a store that a newer version wrote is not half understood.
func TestNewerRecordsAreRefused(t *testing.T) {
	for key := range golden() {
		ix := newIndex()
		err := ix.apply(td, store.Event{Item: store.Item{Key: key, Value: []byte(`{"v":3,"spiffe_id":"spiffe://example.org/a"}`)}}, nil)
		if !errors.Is(err, ErrNewerFormat) || !strings.Contains(err.Error(), key) {
			t.Errorf("%s of version 3: %v", key, err)
		}
	}
	for _, key := range []string{"policy/p", "bundle/partner.example", "defaults"} {
		if err := newIndex().apply(td, store.Event{Item: store.Item{Key: key, Value: []byte(`{"v":2}`)}}, nil); !errors.Is(err, ErrNewerFormat) {
			t.Errorf("%s of version 2: %v", key, err)
		}
	}
}

// FuzzRecords: whatever is in the store, reading it gives an error or a record that is written back the same.
func FuzzRecords(f *testing.F) {
	for key, v := range golden() {
		b, err := encodeAny(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(key, b)
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		kind, name, _ := strings.Cut(key, "/")
		item := store.Item{Key: key, Value: value}
		var v any
		var err error
		switch kind {
		case "entry":
			v, err = decodeEntry(EntryID(name), item)
		case "node":
			v, err = decodeNode(mustID(td, "/spire/agent/join_token/x"), item)
		case "token":
			v, err = decodeToken(name, item)
		case "ack":
			v, err = decodeAck(item)
		case "federation":
			v, err = decodeFederation(spiffeid.RequireTrustDomainFromString("partner.example"), item)
		default:
			_ = newIndex().apply(td, store.Event{Item: item}, nil)
			return
		}
		if err != nil {
			return
		}
		once, err := encodeAny(v)
		if err != nil {
			if _, tooLarge := errors.AsType[*ValidationError](err); !tooLarge {
				t.Fatalf("what was read cannot be written: %v", err)
			}
			return
		}
		again := store.Item{Key: key, Value: once}
		var w any
		switch kind {
		case "entry":
			w, err = decodeEntry(EntryID(name), again)
		case "node":
			w, err = decodeNode(v.(*Node).ID, again)
		case "token":
			w, err = decodeToken(name, again)
		case "ack":
			w, err = decodeAck(again)
		case "federation":
			w, err = decodeFederation(v.(*Federation).TrustDomain, again)
		}
		twice, err2 := encodeAny(w)
		if err != nil || err2 != nil || string(once) != string(twice) {
			t.Errorf("written as\n%s\nread and written again as\n%s (%v %v)", once, twice, err, err2)
		}
	})
}
