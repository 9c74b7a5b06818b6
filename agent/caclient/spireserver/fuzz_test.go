package spireserver

import (
	"context"
	"encoding/binary"
	"io"
	"strings"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// A script is a server that says what it says, whatever it is asked. Each poll takes up where the last has ended.
type script struct {
	entryv1.EntryClient
	grpc.ClientStream
	say [][]byte
}

func (s *script) SyncAuthorizedEntries(context.Context, ...grpc.CallOption) (entryv1.Entry_SyncAuthorizedEntriesClient, error) {
	return s, nil
}

func (s *script) Send(*entryv1.SyncAuthorizedEntriesRequest) error { return nil }

func (s *script) CloseSend() error { return nil }

func (s *script) Recv() (*entryv1.SyncAuthorizedEntriesResponse, error) {
	if len(s.say) == 0 {
		return nil, io.EOF
	}
	m := &entryv1.SyncAuthorizedEntriesResponse{}
	err := proto.Unmarshal(s.say[0], m)
	s.say = s.say[1:]
	return m, err
}

// FuzzEntries polls a server that says anything, until it says no more. What is told always continues what was told before, and no
// entry matches by other selectors than the server has named.
func FuzzEntries(f *testing.F) {
	add := func(messages ...proto.Message) {
		var raw []byte
		for _, m := range messages {
			b, err := proto.Marshal(m)
			if err != nil {
				f.Fatal(err)
			}
			raw = append(binary.BigEndian.AppendUint16(raw, uint16(len(b))), b...)
		}
		f.Add(raw)
	}
	type response = entryv1.SyncAuthorizedEntriesResponse
	full := &response{Entries: []*types.Entry{entryOf("a", 0), entryOf("b", 2, "b.example"), {Id: "c", StoreSvid: true}}}
	add(full, &response{Entries: []*types.Entry{entryOf("b", 1)}}, &response{})
	add(full, &response{EntryRevisions: []*entryv1.EntryRevision{{Id: "a"}, {Id: "b"}}, More: true}, &response{EntryRevisions: []*entryv1.EntryRevision{{Id: "d"}}},
		&response{Entries: []*types.Entry{entryOf("d", 9)}, More: true}, &response{Entries: []*types.Entry{entryOf("a", 9)}})
	f.Fuzz(func(t *testing.T, raw []byte) {
		s := &script{}
		for len(raw) >= 2 {
			n := min(int(binary.BigEndian.Uint16(raw)), len(raw)-2)
			s.say = append(s.say, raw[2:2+n])
			raw = raw[2+n:]
		}
		p, held := newPoller(), newFollower(t)
		p.entries = map[string]heldEntry{}
		for len(s.say) > 0 {
			a, err := p.askEntries(t.Context(), s)
			if err != nil {
				continue
			}
			m := &nodev1.FollowResponse{Epoch: Epoch, From: held.revision, To: held.revision + 1}
			p.entries = p.take(a, m)
			held.epoch = Epoch
			held.apply(m)
			usable := 0
			for id, e := range p.entries {
				if !e.unusable {
					usable++
				}
				if !e.unusable != (held.entries[id] != nil) {
					t.Errorf("entry %q: known as unusable %t, and told %t", id, e.unusable, held.entries[id] != nil)
				}
			}
			if usable != len(held.entries) {
				t.Errorf("%d entries are known, and %d are held", usable, len(held.entries))
			}
			p.federated(p.entries)
		}
		for id, e := range held.entries {
			for _, s := range e.Selectors {
				if kind, _, ok := strings.Cut(s, ":"); !ok || strings.Contains(kind, ":") {
					t.Errorf("entry %q has the selector %q", id, s)
				}
			}
		}
	})
}
