package cli

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-id/signet/spiffe"
)

func (a *app) inspectCommand() *cobra.Command {
	var connect, serverName string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "inspect FILE|- | --connect HOST:PORT",
		Short: "Show what is in an SVID, and every rule of the standards that it breaks",
		Long: `Show what is in an X509-SVID (PEM or DER) or a JWT-SVID: ID, issuer, key, validity with the time left, and every rule of the
SPIFFE standards that it breaks, by the id of the rule. Nothing is verified against a bundle: 'signet svid verify' does that.

The exit status is 1 if the SVID breaks a rule for which peers refuse it, its end included; warnings are rules that only
issuers must keep.`,
		Example: `  signet svid inspect web.pem
  signet svid inspect --connect web.internal:8443
  kubectl exec web -- cat /run/web/svid.pem | signet svid inspect - -o json`,
		Args: atMostArgs(1),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringVar(&connect, "connect", "", "HOST:PORT of a TLS server whose SVID to show")
	cmd.Flags().StringVar(&serverName, "server-name", "", "with --connect: name to ask the server for (SNI)")
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Second, "with --connect: how long to wait for the server")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if (connect == "") == (len(args) == 0) {
			return &usageError{err: fmt.Errorf("signet svid inspect needs a file, - for stdin, or --connect, and only one of them"), hint: example(cmd)}
		}
		var in inspection
		if connect != "" {
			chain, err := peerChain(cmd.Context(), connect, serverName, timeout)
			if err != nil {
				return err
			}
			in = a.inspectChain(chain)
		} else {
			data, err := a.readInput(args[0], maxSVIDFile)
			if err != nil {
				return err
			}
			if in, err = a.inspectData(inputName(args[0]), data); err != nil {
				return err
			}
		}
		if err := a.showInspection(*output, in); err != nil {
			return err
		}
		if n := in.errors(); n > 0 {
			return fmt.Errorf("the SVID breaks %s for which peers refuse it", count(n, "rule"))
		}
		return nil
	}
	return cmd
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// An inspection is what an SVID says about itself.
type inspection struct {
	Kind      string         `json:"kind"`
	SPIFFEID  string         `json:"spiffe_id,omitempty"`
	Issuer    string         `json:"issuer,omitempty"`
	Serial    string         `json:"serial_number,omitempty"`
	Key       string         `json:"key,omitempty"`
	Signature string         `json:"signature,omitempty"`
	NotBefore string         `json:"not_before,omitempty"`
	NotAfter  string         `json:"not_after,omitempty"`
	Left      string         `json:"time_left,omitempty"`
	RenewAt   string         `json:"half_life,omitempty"`
	DNSNames  []string       `json:"dns_names,omitempty"`
	Audience  []string       `json:"audience,omitempty"`
	SHA256    string         `json:"sha256,omitempty"`
	Chain     []chainLink    `json:"chain,omitempty"`
	Header    map[string]any `json:"header,omitempty"`
	Claims    map[string]any `json:"claims,omitempty"`
	Hints     []string       `json:"hints,omitempty"`
	Findings  []finding      `json:"findings"`

	end time.Time
}

type chainLink struct {
	Subject  string `json:"subject"`
	SPIFFEID string `json:"spiffe_id,omitempty"`
	Key      string `json:"key"`
	NotAfter string `json:"not_after"`
}

type finding struct {
	Row     string `json:"row"`
	Level   string `json:"level"`
	Message string `json:"message"`
}

func (in *inspection) add(found []spiffe.Finding) {
	in.Findings = []finding{}
	for _, f := range found {
		in.Findings = append(in.Findings, finding{f.Row, f.Level, f.Message})
	}
	slices.SortStableFunc(in.Findings, func(x, y finding) int { return cmp.Compare(x.Level, y.Level) })
}

func (in *inspection) errors() int {
	n := 0
	for _, f := range in.Findings {
		if f.Level == spiffe.LevelError {
			n++
		}
	}
	return n
}

// inspectData tells by its looks what data is.
func (a *app) inspectData(name string, data []byte) (inspection, error) {
	text := strings.TrimSpace(string(data))
	if !strings.Contains(text, "-----BEGIN ") && strings.Count(text, ".") >= 2 && isToken(text) {
		return a.inspectToken(name, text)
	}
	certs, hasKey, err := parseCertificates(data)
	if err != nil {
		return inspection{}, withHint(fmt.Errorf("reading %q: %w", name, err), "it must be an X509-SVID in PEM or DER, or a JWT-SVID")
	}
	in := a.inspectChain(certs)
	if hasKey {
		in.Hints = append(in.Hints, "the file also holds a private key; it is not shown")
	}
	return in, nil
}

// isToken tells whether text could be a token: base64url and dots. Padding is let through, for it to be reported.
func isToken(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool {
		return (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.' && r != '='
	})
}

func (a *app) inspectChain(chain []*x509.Certificate) inspection {
	now, leaf := a.now(), chain[0]
	sum := sha256.Sum256(leaf.Raw)
	in := inspection{
		Kind: "X509-SVID", Issuer: leaf.Issuer.String(), Serial: leaf.SerialNumber.String(), Key: keyName(leaf.PublicKey),
		Signature: leaf.SignatureAlgorithm.String(), NotBefore: stamp(leaf.NotBefore), NotAfter: stamp(leaf.NotAfter), Left: left(leaf.NotAfter, now),
		RenewAt: stamp(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)), DNSNames: leaf.DNSNames, SHA256: hex.EncodeToString(sum[:]), end: leaf.NotAfter,
	}
	var uris []string
	for _, u := range leaf.URIs {
		uris = append(uris, u.String())
	}
	in.SPIFFEID = strings.Join(uris, " ")
	if len(leaf.AuthorityKeyId) > 0 {
		in.Issuer = strings.TrimSpace(in.Issuer + " (key " + hex.EncodeToString(leaf.AuthorityKeyId) + ")")
	}
	for i, c := range chain[1:] {
		link := chainLink{Subject: c.Subject.String(), Key: keyName(c.PublicKey), NotAfter: stamp(c.NotAfter)}
		if len(c.URIs) == 1 {
			link.SPIFFEID = c.URIs[0].String()
		}
		in.Chain = append(in.Chain, link)
		if bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) == nil {
			in.Hints = append(in.Hints, fmt.Sprintf("certificate %d is self-signed: the chain of an SVID ends before the authority, peers have it in their bundle", i+1))
		}
	}
	if now.After(leaf.NotAfter) {
		in.Hints = append(in.Hints, "agents renew at half life: whoever presents this no longer gets renewals, or does not use them")
	} else if half := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) * 3 / 4); now.After(half) {
		in.Hints = append(in.Hints, "three quarters of its life are over and agents renew at half: whoever presents this may no longer get renewals")
	}
	if leaf.IsCA {
		in.Hints = append(in.Hints, "this is the certificate of an authority: it belongs into a bundle and signs SVIDs")
	}
	in.add(spiffe.InspectX509SVID(chain, now))
	return in
}

func (a *app) inspectToken(name, token string) (inspection, error) {
	now := a.now()
	header, claims, found, err := spiffe.InspectJWTSVID(token, now)
	if err != nil {
		return inspection{}, withHint(fmt.Errorf("reading the token in %q: %w", name, err), "a JWT-SVID is three base64url parts with dots between them")
	}
	in := inspection{Kind: "JWT-SVID", Header: header, Claims: claims, Audience: stringsOf(claims["aud"])}
	in.SPIFFEID, _ = claims["sub"].(string)
	in.Issuer, _ = claims["iss"].(string)
	alg, _ := header["alg"].(string)
	kid, _ := header["kid"].(string)
	in.Key, in.Signature = kid, alg
	begin, hasBegin := numericDate(claims["iat"])
	if nbf, ok := numericDate(claims["nbf"]); ok {
		begin, hasBegin = nbf, true
	}
	if hasBegin {
		in.NotBefore = stamp(begin)
	}
	if end, ok := numericDate(claims["exp"]); ok {
		in.NotAfter, in.Left, in.end = stamp(end), left(end, now), end
		if hasBegin && end.After(begin) {
			in.RenewAt = stamp(begin.Add(end.Sub(begin) / 2))
		}
	}
	if len(in.Audience) > 1 {
		in.Hints = append(in.Hints, "any of its audiences can use the token at the others: one audience per token is safer")
	}
	in.add(found)
	return in, nil
}

// stringsOf reads a claim that is a string or a list of strings; what else is in it is left to the findings.
func stringsOf(claim any) []string {
	switch v := claim.(type) {
	case string:
		return []string{v}
	case []any:
		var out []string
		for _, x := range v {
			if s, ok := x.(string); ok {
				out = append(out, s)
			}
		}
		return out
	}
	return nil
}

// numericDate reads a NumericDate as far as it lies between the years 1970 and 9999. [RFC 7519 §2]
func numericDate(claim any) (time.Time, bool) {
	n, ok := claim.(json.Number)
	if !ok {
		return time.Time{}, false
	}
	seconds, err := n.Float64()
	if err != nil || seconds <= 0 || seconds > 253402300799 {
		return time.Time{}, false
	}
	return time.Unix(int64(seconds), 0), true
}

func (a *app) showInspection(f format, in inspection) error {
	if f == formatJSON || f == formatYAML {
		return a.show(f, in, nil)
	}
	validity := in.NotAfter
	color := green
	if validity != "" {
		validity += " (" + in.Left + ")"
	}
	if strings.HasPrefix(in.Left, "expired") {
		color = red
	}
	key := field{name: "Key", value: in.Key}
	if in.Kind == "JWT-SVID" {
		key.name = "Key ID"
	}
	fields := []field{
		{name: "Kind", value: in.Kind}, {name: "SPIFFE ID", value: in.SPIFFEID, color: bold}, {name: "Issuer", value: in.Issuer}, key,
		{name: "Signature", value: in.Signature}, {name: "Serial", value: in.Serial},
		{name: "Valid from", value: in.NotBefore}, {name: "Valid until", value: validity, color: color}, {name: "Half life", value: in.RenewAt},
	}
	fields = append(fields, manyFields("Audience", in.Audience)...)
	fields = append(fields, manyFields("DNS name", in.DNSNames)...)
	for _, name := range sortedKeys(in.Claims) {
		if !slices.Contains([]string{"sub", "iss", "aud", "exp", "iat", "nbf"}, name) {
			text, err := json.Marshal(in.Claims[name])
			if err != nil {
				return fmt.Errorf("encoding the claim %q: %w", name, err)
			}
			fields = append(fields, field{name: "Claim", value: name + " = " + string(text)})
		}
	}
	for _, link := range in.Chain {
		fields = append(fields, field{name: "Issued by", value: strings.TrimSpace(link.SPIFFEID + "  " + link.Subject + ", " + link.Key + ", until " + link.NotAfter)})
	}
	fields = append(fields, field{name: "SHA-256", value: in.SHA256})
	for _, h := range in.Hints {
		fields = append(fields, field{name: "Hint", value: h, color: cyan})
	}
	if err := a.show(f, in, fields); err != nil {
		return err
	}
	if len(in.Findings) == 0 {
		_, err := fmt.Fprintf(a.stdout, "\n%s\n", paint(a.color, green, "It breaks no rule."))
		return err
	}
	fmt.Fprintln(a.stdout)
	return list(a, f, "", []column[finding]{
		{name: "RULE", value: func(x finding) string { return x.Row }},
		{name: "LEVEL", value: func(x finding) string { return x.Level }, color: func(x finding) string {
			if x.Level == spiffe.LevelError {
				return red
			}
			return yellow
		}},
		{name: "WHAT IS WRONG", value: func(x finding) string { return x.Message }},
	}, in.Findings)
}

// peerChain returns the certificates that a TLS server presents, unverified. A server that goes on to refuse us, for
// want of a client certificate, has shown them by then.
func peerChain(ctx context.Context, address, serverName string, timeout time.Duration) ([]*x509.Certificate, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, usagef("--connect %q is not of the form HOST:PORT", address)
	}
	if _, err := netip.ParseAddr(host); serverName == "" && err != nil {
		serverName = host
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var chain []*x509.Certificate
	dialer := &tls.Dialer{Config: &tls.Config{
		ServerName:         serverName,
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // the SVID is shown, not trusted, and nothing is sent
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			for i, der := range raw {
				cert, err := x509.ParseCertificate(der)
				if err != nil {
					return fmt.Errorf("certificate %d of the server: %w", i+1, err)
				}
				chain = append(chain, cert)
			}
			return nil
		},
	}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err == nil {
		conn.Close()
	}
	if len(chain) > 0 {
		return chain, nil
	}
	if err == nil {
		err = errors.New("the server presented no certificate")
	}
	return nil, fmt.Errorf("asking %q for its SVID: %w", address, err)
}
