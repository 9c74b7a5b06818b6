package sealed

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// FuzzRecords feeds frames as if they had been opened: what is taken can be written again and gives the same.
func FuzzRecords(f *testing.F) {
	changes, _, err := fold(snapshot(3, "a", "b"), nil, &nodev1.Position{Cluster: "prod", Versions: map[string]uint64{"pods": 7}})
	if err != nil {
		f.Fatal(err)
	}
	svid := SVID{EntryID: "a", EntryRevision: 3, Used: true, Chain: []byte("c"), Key: []byte("k")}
	changes[recordKey{kindSVID, "a"}] = svid.encode()
	var frame []byte
	for k, v := range changes {
		frame = appendRecord(frame, k, v)
	}
	f.Add(frame)
	f.Add(appendRecord(nil, recordKey{kindEntry, "gone"}, nil))
	f.Fuzz(func(t *testing.T, frame []byte) {
		held := make(records)
		if held.take(frame) != nil {
			return
		}
		var again []byte
		for k, v := range held {
			again = appendRecord(again, k, v)
		}
		twice := make(records)
		if err := twice.take(again); err != nil || len(twice) != len(held) {
			t.Fatalf("what was taken cannot be written: %v", err)
		}
		for k, v := range held {
			if !bytes.Equal(twice[k], v) {
				t.Fatalf("record %v changed", k)
			}
		}
		state, svids, err := held.unfold()
		if err != nil {
			return
		}
		for _, s := range svids {
			if back, err := decodeSVID(s.EntryID, s.encode()); err != nil || back.EntryRevision != s.EntryRevision || back.Used != s.Used ||
				!bytes.Equal(back.Chain, s.Chain) || !bytes.Equal(back.Key, s.Key) {
				t.Fatalf("SVID %v became %v, %v", s, back, err)
			}
		}
		changes, _, err := fold(state, state.PolicyDefaults, state.Position)
		if err != nil {
			t.Fatal(err)
		}
		refolded, _, err := changes.unfold()
		if err != nil || !proto.Equal(sorted(refolded), sorted(state)) && len(changes) == len(held)-len(svids) {
			t.Fatalf("the state changed on its way: %v", err)
		}
	})
}

// FuzzFiles feeds head and log under the golden key: nothing but what was written is opened.
func FuzzFiles(f *testing.F) {
	raw, head, log := golden(f)
	s, o := &secret{b: [secretBytes]byte(raw)}, owner{kind: "file", trustDomain: td.Name(), agent: agent.String()}
	h, err := openHead(s, o, head)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(head, log)
	f.Add([]byte(headMagic), []byte(logMagic))
	f.Fuzz(func(t *testing.T, headBytes, logBytes []byte) {
		if _, err := openHead(s, o, headBytes); err == nil && !bytes.Equal(headBytes, head) {
			t.Fatal("a head was opened that nobody sealed")
		}
		held := make(records)
		if err := readLog(s, o, h, logBytes, held.take); err == nil && !bytes.HasPrefix(logBytes, log) {
			t.Fatal("a log was opened that nobody sealed")
		}
	})
}
