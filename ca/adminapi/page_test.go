package adminapi

import (
	"errors"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"

	"github.com/signet-id/signet/ca/registry"
)

func TestPageTokenBelongsToItsListAndFilter(t *testing.T) {
	filter := func(attestor string) *agentv1.ListAgentsRequest_Filter {
		return &agentv1.ListAgentsRequest_Filter{ByAttestationType: attestor}
	}
	agents := cursor{"agents", filter("join_token")}
	token := agents.write("spiffe://example.org/spire/agent/x")
	if after, err := (cursor{"agents", filter("join_token")}).read(token); err != nil || after != "spiffe://example.org/spire/agent/x" {
		t.Errorf("read = %q, %v", after, err)
	}
	for name, c := range map[string]cursor{"another filter": {"agents", filter("x509pop")}, "no filter": {list: "agents"}, "another list": {"bundles", filter("join_token")}} {
		if _, err := c.read(token); err == nil || !strings.Contains(err.Error(), "page_token") {
			t.Errorf("a token for %s: %v", name, err)
		}
	}
	// A filter that was not given and one that is empty are the same to nobody but the wire.
	var none *agentv1.ListAgentsRequest_Filter
	if _, err := (cursor{"agents", none}).read(cursor{list: "agents"}.write("x")); err != nil {
		t.Error(err)
	}
}

// FuzzCursor: what is no token is a *ValidationError; what is one is written as it was read.
func FuzzCursor(f *testing.F) {
	c := cursor{list: "agents"}
	f.Add(c.write("spiffe://example.org/spire/agent/x"))
	f.Add("")
	f.Add("%%%")
	f.Add(strings.Repeat("A", maxPageToken+1))
	f.Fuzz(func(t *testing.T, token string) {
		after, err := c.read(token)
		if err != nil {
			if v := (*registry.ValidationError)(nil); !errors.As(err, &v) || after != "" {
				t.Errorf("read(%q) = %q, %v", token, after, err)
			}
			return
		}
		if token != "" && c.write(after) != token {
			t.Errorf("read(%q) = %q, which is written %q", token, after, c.write(after))
		}
	})
}
