package gcpiit

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const token = "aGVhZGVy.cGF5bG9hZA.c2lnbmF0dXJl"

func TestPayload(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if r.Method != http.MethodGet || r.Header.Get("Metadata-Flavor") != "Google" || q.Get("audience") != "spiffe://example.org" || q.Get("format") != "full" ||
			r.URL.Path != "/computeMetadata/v1/instance/service-accounts/web@shop.iam.gserviceaccount.com/identity" {
			http.Error(w, "", http.StatusBadRequest)
			return
		}
		w.Header().Set("Metadata-Flavor", "Google")
		fmt.Fprint(w, token)
	}))
	defer server.Close()
	e, err := New(Config{MetadataEndpoint: server.URL, ServiceAccount: "web@shop.iam.gserviceaccount.com", Audience: "spiffe://example.org"}).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if payload, err := e.Payload(t.Context()); err != nil || string(payload) != token || e.Type() != "gcp_iit" {
		t.Errorf("payload %q of type %s, %v", payload, e.Type(), err)
	}
	if s := fmt.Sprintf("%v %+v %#v %s", e, e, e, e); strings.Contains(s, "c2lnbmF0dXJl") {
		t.Errorf("the evidence prints as %q", s)
	}
	if _, err := e.Respond(t.Context(), []byte("?")); err == nil {
		t.Error("a challenge was answered")
	}
}

func TestFaults(t *testing.T) {
	for _, tt := range []struct{ name, flavor, body, want string }{
		{"somebody else", "", token, "not Google's metadata server"},
		{"a page", "Google", "<html>s3cret</html>", "not an identity token"},
		{"nothing", "Google", "", "not an identity token"},
		{"not signed", "Google", "aGVhZGVy.cGF5bG9hZA.", "not an identity token"},
		{"huge", "Google", "a.b." + strings.Repeat("c", maxTokenBytes), "not an identity token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if tt.flavor != "" {
					w.Header().Set("Metadata-Flavor", tt.flavor)
				}
				fmt.Fprint(w, tt.body)
			}))
			defer server.Close()
			_, err := New(Config{MetadataEndpoint: server.URL}).Begin(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		config Config
		want   string
	}{
		{Config{}, ""},
		{Config{MetadataEndpoint: "metadata"}, "metadata_endpoint"},
		{Config{ServiceAccount: "../../x"}, "service_account"},
		{Config{Audience: strings.Repeat("a", maxFieldBytes+1)}, "audience"},
	} {
		told := ""
		tt.config.Check(func(field, _ string, _ ...any) { told += field })
		if told != tt.want {
			t.Errorf("Check of %+v tells of %q, want %q", tt.config, told, tt.want)
		}
	}
}

// What is sent has the form of a signed JWT and nothing around it.
func FuzzToken(f *testing.F) {
	f.Add([]byte(token + "\n"))
	f.Add([]byte("a.b."))
	f.Fuzz(func(t *testing.T, body []byte) {
		got, err := readToken(body)
		if err != nil {
			return
		}
		if strings.Count(string(got), ".") != 2 || strings.ContainsAny(string(got), " \r\n\t\"\x00") || len(got) > maxTokenBytes {
			t.Fatalf("readToken(%q) = %q", body, got)
		}
	})
}
