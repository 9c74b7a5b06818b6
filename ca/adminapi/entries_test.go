package adminapi

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/ca/spireproto"
	"github.com/signet-id/signet/ca/store"
	"github.com/signet-id/signet/spiffe"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("example.org")
	api = New(Config{TrustDomain: td})
)

// full is an entry in which every field is set, and fullProto another one, in SPIRE's form.
func full() *registry.Entry {
	return &registry.Entry{ID: "full", SPIFFEID: spiffeid.RequireFromPath(td, "/web"), ParentID: spiffeid.RequireFromPath(td, "/node"),
		Selectors: []spiffe.Selector{{Type: "unix", Value: "uid:1"}}, X509TTL: time.Minute, JWTTTL: 2 * time.Minute,
		FederatesWith: []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("partner.example")}, DNSNames: []string{"web"}, Hint: "hint",
		Admin: true, Downstream: true, StoreSVID: true, NoX509Prefetch: true, JWTIncludeJTI: true,
		ExpiresAt: time.Unix(1000, 0).UTC(), CreatedAt: time.Unix(500, 0).UTC(), Revision: store.Revision(7)}
}

func fullProto() *types.Entry {
	return &types.Entry{Id: "other", SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/other"}, ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/alias"},
		Selectors: []*types.Selector{{Type: "k8s", Value: "ns:x"}}, X509SvidTtl: 30, JwtSvidTtl: 40, FederatesWith: []string{"second.example"}, DnsNames: []string{"db"}, Hint: "new",
		ExpiresAt: 2000, CreatedAt: 1, RevisionNumber: 1}
}

// maskFields are the fields of an entry that a mask knows: all but the ID.
func maskFields(t testing.TB) (names []protoreflect.Name) {
	fields := (&types.EntryMask{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		names = append(names, fields.Get(i).Name())
	}
	if all := (&types.Entry{}).ProtoReflect().Descriptor().Fields(); len(names) != all.Len()-1 {
		t.Fatalf("a mask has %d fields, an entry %d", len(names), all.Len())
	}
	return names
}

func mask(names ...protoreflect.Name) *types.EntryMask {
	m := &types.EntryMask{}
	for _, n := range names {
		m.ProtoReflect().Set(m.ProtoReflect().Descriptor().Fields().ByName(n), protoreflect.ValueOfBool(true))
	}
	return m
}

func get(e *types.Entry, n protoreflect.Name) (protoreflect.Value, bool) {
	f := e.ProtoReflect().Descriptor().Fields().ByName(n)
	return e.ProtoReflect().Get(f), e.ProtoReflect().Has(f)
}

func TestOutputMaskOfEveryField(t *testing.T) {
	names := maskFields(t)
	if got := spireproto.Entry(full(), mask()); !proto.Equal(got, &types.Entry{Id: "full"}) {
		t.Errorf("with an empty mask: %v; want the ID alone", got)
	}
	if !proto.Equal(spireproto.Entry(full(), nil), spireproto.Entry(full(), mask(names...))) {
		t.Error("no mask is not the same as all of it")
	}
	for _, n := range names {
		got := spireproto.Entry(full(), mask(n))
		if got.Id != "full" {
			t.Errorf("mask %s: ID %q", n, got.Id)
		}
		for _, other := range names {
			if _, set := get(got, other); set != (other == n) {
				t.Errorf("mask %s: field %s set: %t", n, other, set)
			}
		}
	}
}

func TestInputMaskOfEveryField(t *testing.T) {
	names := maskFields(t)
	readOnly := map[protoreflect.Name]bool{"revision_number": true, "created_at": true}
	before := spireproto.Entry(full(), nil)
	e := full()
	if err := api.fill(e, fullProto(), mask()); err != nil || !proto.Equal(spireproto.Entry(e, nil), before) {
		t.Errorf("with an empty mask (%v): %v", err, spireproto.Entry(e, nil))
	}
	for _, n := range names {
		e := full()
		if err := api.fill(e, fullProto(), mask(n)); err != nil {
			t.Fatal(err)
		}
		after := spireproto.Entry(e, nil)
		for _, other := range names {
			was, _ := get(before, other)
			is, _ := get(after, other)
			if changed := !was.Equal(is); changed != (other == n && !readOnly[n]) {
				t.Errorf("input mask %s: field %s changed: %t (%v to %v)", n, other, changed, was, is)
			}
		}
		if e.ID != "full" {
			t.Errorf("input mask %s changed the ID to %q", n, e.ID)
		}
	}
}

func FuzzMask(f *testing.F) {
	for _, m := range []*types.EntryMask{{}, spireproto.AllEntryFields(), {SpiffeId: true, Selectors: true}} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0x08, 0x01, 0x10, 0x7f, 0xfa, 0x07, 0x00}) // fields that nobody knows
	names := maskFields(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &types.EntryMask{}
		if proto.Unmarshal(b, m) != nil {
			return
		}
		named := map[protoreflect.Name]bool{}
		for _, n := range names {
			named[n] = m.ProtoReflect().Get(m.ProtoReflect().Descriptor().Fields().ByName(n)).Bool()
		}
		out := spireproto.Entry(full(), m)
		before := spireproto.Entry(full(), nil)
		e := full()
		if err := api.fill(e, fullProto(), m); err != nil {
			t.Fatal(err)
		}
		after := spireproto.Entry(e, nil)
		for _, n := range names {
			if _, set := get(out, n); set && !named[n] {
				t.Errorf("output: field %s, which the mask does not name", n)
			}
			was, _ := get(before, n)
			if is, _ := get(after, n); !was.Equal(is) && !named[n] {
				t.Errorf("input: field %s changed, which the mask does not name", n)
			}
		}
	})
}

// FuzzPageToken: what is taken for a token is one that writeToken makes, and holds nothing that no ID has.
func FuzzPageToken(f *testing.F) {
	for _, s := range []string{"", writeToken("id-1"), writeToken("spiffe://example.org/spire/agent/x"), "AAAA", "%%%", "MTo", "MTpp\n", writeToken("\x00"), writeToken("é"), "MTpA=="} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, token string) {
		last, err := readToken(token)
		if err != nil {
			if _, ok := errors.AsType[*registry.ValidationError](err); !ok {
				t.Errorf("readToken(%q): %v, which is no ValidationError", token, err)
			}
			return
		}
		if token == "" {
			if last != "" {
				t.Errorf("no token: %q", last)
			}
			return
		}
		if again := writeToken(last); again != token {
			t.Errorf("readToken(%q) = %q, whose token is %q", token, last, again)
		}
		for _, c := range []byte(last) {
			if c <= ' ' || c > '~' {
				t.Errorf("readToken(%q) = %q", token, last)
			}
		}
	})
}

// FuzzFilter: a filter that is taken means something, and one that is not says what is wrong with it.
func FuzzFilter(f *testing.F) {
	for _, in := range []*entryv1.ListEntriesRequest_Filter{
		{},
		{BySpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/x"}, ByParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/server"}},
		{BySelectors: &types.SelectorMatch{Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}}, Match: types.SelectorMatch_MATCH_ANY}},
		{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"partner.example"}, Match: types.FederatesWithMatch_MATCH_SUBSET}},
		{BySelectors: &types.SelectorMatch{Match: 99}},
	} {
		b, err := proto.Marshal(in)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := &entryv1.ListEntriesRequest_Filter{}
		if proto.Unmarshal(b, in) != nil {
			return
		}
		got, err := api.filter(in)
		if err != nil {
			if _, ok := errors.AsType[*registry.ValidationError](err); !ok {
				t.Errorf("%v, which is no ValidationError", err)
			}
			return
		}
		if in.BySpiffeId != nil && got.SPIFFEID.IsZero() || in.ByParentId != nil && got.ParentID.IsZero() || in.BySelectors != nil && len(got.Selectors) == 0 ||
			in.ByFederatesWith != nil && len(got.FederatesWith) == 0 || in.ByHint != nil && got.Hint == nil {
			t.Errorf("%v lost a condition: %+v", in, got)
		}
	})
}

func TestFiltersAreBounded(t *testing.T) {
	m := &types.SelectorMatch{}
	f := &types.FederatesWithMatch{}
	for i := range maxFilterItems + 1 {
		m.Selectors = append(m.Selectors, &types.Selector{Type: "unix", Value: fmt.Sprint("uid:", i)})
		f.TrustDomains = append(f.TrustDomains, fmt.Sprintf("t%d.example", i))
	}
	for _, in := range []*entryv1.ListEntriesRequest_Filter{{BySelectors: m}, {ByFederatesWith: f}} {
		if _, err := api.filter(in); err == nil {
			t.Error("a filter with 1001 items was taken")
		}
	}
	m.Selectors, f.TrustDomains = m.Selectors[1:], f.TrustDomains[1:]
	if _, err := api.filter(&entryv1.ListEntriesRequest_Filter{BySelectors: m, ByFederatesWith: f}); err != nil {
		t.Error(err)
	}
}
