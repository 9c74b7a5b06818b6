package awsiid

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// imds answers as the instance metadata service version 2 does.
type imds struct {
	token             string
	document, rsa2048 string
}

func (i imds) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const folder = "/latest/dynamic/instance-identity/"
	if r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" {
		if r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds") == "" {
			http.Error(w, "", http.StatusBadRequest)
			return
		}
		fmt.Fprint(w, i.token)
		return
	}
	if r.Method != http.MethodGet || r.Header.Get("X-Aws-Ec2-Metadata-Token") != i.token {
		http.Error(w, "", http.StatusUnauthorized)
		return
	}
	switch r.URL.Path {
	case folder + "document":
		fmt.Fprint(w, i.document)
	case folder + "signature":
		fmt.Fprint(w, "c2hvcnQ=")
	case folder + "rsa2048":
		fmt.Fprint(w, i.rsa2048)
	default:
		http.NotFound(w, r)
	}
}

func begin(t *testing.T, handler http.Handler) ([]byte, error) {
	t.Helper()
	server := httptest.NewServer(handler)
	defer server.Close()
	e, err := New(Config{MetadataEndpoint: server.URL}).Begin(t.Context())
	if err != nil {
		return nil, err
	}
	if e.Type() != "aws_iid" {
		t.Errorf("Type() = %q", e.Type())
	}
	return e.Payload(t.Context())
}

func TestPayload(t *testing.T) {
	const document = "{\n  \"accountId\" : \"123456789012\", \"name\" : \"<&>\u2028é\"\n}"
	payload, err := begin(t, imds{token: "AQAAtoken==", document: document, rsa2048: "MIAG\nAAA="})
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]string
	if err := json.Unmarshal(payload, &got); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"document": document, "signature": "c2hvcnQ=", "rsa2048": "MIAG\nAAA="} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q, byte for byte", name, got[name], want)
		}
	}
	if len(got) != 3 {
		t.Errorf("the payload has %d members, want 3: %s", len(got), payload)
	}
}

func TestFaults(t *testing.T) {
	for _, tt := range []struct {
		name    string
		handler http.Handler
		want    string
	}{
		{"version 1 only", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				http.Error(w, "", http.StatusForbidden)
				return
			}
			fmt.Fprint(w, "document")
		}), "hop limit"},
		{"no document", imds{token: "t", rsa2048: "x"}, "empty"},
		{"no signature", imds{token: "t", document: "x"}, "empty"},
		{"not text", imds{token: "t", document: "\xff", rsa2048: "x"}, "not UTF-8"},
		{"no token", imds{document: "x", rsa2048: "x"}, "session token"},
		{"a token that is two lines", imds{token: "t\r\nX: s3cret", document: "x", rsa2048: "x"}, "session token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := begin(t, tt.handler)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

// What is sent is what came, or nothing.
func FuzzPayload(f *testing.F) {
	f.Add("{}", "c2ln", "MIAG\n")
	f.Add("\xff", "", "x")
	f.Fuzz(func(t *testing.T, document, signature, rsa2048 string) {
		sent := payload{Document: document, Signature: signature, RSA2048: rsa2048}
		data, err := sent.encode()
		if err != nil {
			return
		}
		var got payload
		if err := json.Unmarshal(data, &got); err != nil || got != sent {
			t.Fatalf("%+v arrives as %+v, %v", sent, got, err)
		}
	})
}
