package ca

import (
	"bytes"
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// TestTwoNodesAreSentNothingOfEachOther records every byte that two nodes are sent over Follow, through snapshots,
// differences, removals and a sync, and looks for anything that is the other's. A stolen node must not learn the call
// graph. [DESIGN §4]
func TestTwoNodesAreSentNothingOfEachOther(t *testing.T) {
	h := start(t, config(t.TempDir()))
	world := func(side, other, version string) string {
		return fmt.Sprintf(`---
kind: Identity
name: name-%[1]s
spiffeID: /id-%[1]s
match: ["unix:path:/bin/sel-%[1]s"]
on: ["node:group:%[1]s"]
hint: hint-%[1]s
dnsNames: [dns-%[1]s.%[3]s.internal]
---
kind: CallPolicy
name: policy-%[1]s
service: /id-%[1]s
allow:
  - from: [/caller-%[1]s]
    http: [{methods: [GET], paths: [/path-%[1]s/%[3]s]}]
---
kind: CallPolicy
name: shared-%[3]s
service: [/id-%[1]s, /id-%[2]s]
allow:
  - from: [/everyone]
`, side, other, version)
	}
	h.apply(world("left", "right", "v1"))
	h.apply("---\nkind: Identity\nname: name-right\nspiffeID: /id-right\nmatch: [\"unix:path:/bin/sel-right\"]\non: [\"node:group:right\"]\n")
	left, right := h.agent("left"), h.agent("right")
	sent := map[string]*bytes.Buffer{"left": {}, "right": {}}
	streams := map[string]nodev1.Node_FollowClient{"left": hello(t, left, "", 0), "right": hello(t, right, "", 0)}
	read := func(side string) {
		t.Helper()
		for {
			m, err := streams[side].Recv()
			if err != nil {
				t.Fatal(err)
			}
			b, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			sent[side].Write(b)
			if m.Complete && len(m.SyncIds) > 0 {
				return
			}
		}
	}
	sync := func() {
		t.Helper()
		for side, s := range streams {
			if err := s.Send(&nodev1.FollowRequest{Message: &nodev1.FollowRequest_Sync_{Sync: &nodev1.FollowRequest_Sync{Id: 1}}}); err != nil {
				t.Fatal(err)
			}
			read(side)
		}
	}
	sync()
	h.apply(world("right", "left", "v2"))
	sync()
	h.apply(world("left", "right", "v3"))
	sync()
	h.apply("kind: Identity\nname: name-left\nspiffeID: /id-left\nmatch: [\"unix:path:/bin/sel-left\"]\non: [\"node:group:nobody\"]\n")
	sync()
	for side, other := range map[string]string{"left": "right", "right": "left"} {
		got := sent[side].Bytes()
		if !bytes.Contains(got, []byte("/id-"+side)) {
			t.Fatalf("%s was not sent its own entry: the test looks at nothing", side)
		}
		for _, what := range []string{"id-", "name-", "sel-", "hint-", "dns-", "policy-", "caller-", "path-"} {
			if bytes.Contains(got, []byte(what+other)) {
				t.Errorf("%s was sent %q", side, what+other)
			}
		}
		if bytes.Contains(got, []byte(map[string]string{"left": right.id.String(), "right": left.id.String()}[side])) {
			t.Errorf("%s learned of the other node", side)
		}
	}
}
