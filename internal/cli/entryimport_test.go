package cli

import (
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// FuzzReadEntries: what is read is written and read again the same, and every entry has an ID of its own.
func FuzzReadEntries(f *testing.F) {
	f.Add([]byte(`{"entries":[{"id":"web","spiffe_id":{"trust_domain":"example.org","path":"/web"},"selectors":[{"type":"unix","value":"uid:1"}],"expires_at":"12"}],"next_page_token":""}`))
	f.Add([]byte(`{"entries":[{"id":"a"}]}{"entries":[{"id":"b","additional_attributes":null}]}`))
	f.Add([]byte(`{"entries":[{"id":"a"},{"id":"a"}]}`))
	f.Add([]byte(`{"entries":null} 7`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := readEntries("fuzz", data)
		if err != nil {
			return
		}
		seen := map[string]bool{}
		for _, e := range list {
			if e.GetId() == "" || seen[e.GetId()] {
				t.Fatalf("entry %q without an ID of its own", e.GetId())
			}
			seen[e.GetId()] = true
		}
		text, err := protojson.Marshal(&entryv1.ListEntriesResponse{Entries: list})
		if err != nil {
			t.Fatal(err)
		}
		again, err := readEntries("again", text)
		if err != nil || len(again) != len(list) {
			t.Fatalf("read %d entries, written and read again %d: %v", len(list), len(again), err)
		}
		for i := range list {
			if !proto.Equal(list[i], again[i]) {
				t.Errorf("read %v, written and read again %v", list[i], again[i])
			}
		}
	})
}
