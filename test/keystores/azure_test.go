//go:build cgo

package keystores_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"strings"
)

const azureToken = "azure-access-token"

// serveAzureLogin is Microsoft's identity platform, as far as a client with a secret asks it.
func serveAzureLogin(w http.ResponseWriter, r *http.Request) {
	base := "https://login.microsoftonline.com/" + "11111111-2222-3333-4444-555555555555"
	switch {
	case strings.HasSuffix(r.URL.Path, "/discovery/instance"):
		answer(w, http.StatusOK, map[string]any{"tenant_discovery_endpoint": base + "/v2.0/.well-known/openid-configuration", "api-version": "1.1",
			"metadata": []map[string]any{{"preferred_network": "login.microsoftonline.com", "preferred_cache": "login.windows.net", "aliases": []string{"login.microsoftonline.com"}}}})
	case strings.HasSuffix(r.URL.Path, "/.well-known/openid-configuration"):
		answer(w, http.StatusOK, map[string]any{"token_endpoint": base + "/oauth2/v2.0/token", "authorization_endpoint": base + "/oauth2/v2.0/authorize", "issuer": base + "/v2.0"})
	case strings.HasSuffix(r.URL.Path, "/oauth2/v2.0/token"):
		if err := r.ParseForm(); err != nil || r.Form.Get("client_id") != "signet" || r.Form.Get("client_secret") != "azure-secret" {
			answer(w, http.StatusUnauthorized, map[string]any{"error": "invalid_client"})
			return
		}
		answer(w, http.StatusOK, map[string]any{"token_type": "Bearer", "expires_in": 3600, "ext_expires_in": 3600, "access_token": azureToken})
	default:
		http.NotFound(w, r)
	}
}

// serveAzure is Azure Key Vault, as far as the driver calls it.
func serveAzure(v *vault, w http.ResponseWriter, r *http.Request) {
	fail := func(code int, kind, message string) {
		answer(w, code, map[string]any{"error": map[string]string{"code": kind, "message": message}})
	}
	if r.Header.Get("Authorization") != "Bearer "+azureToken {
		w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.microsoftonline.com/11111111-2222-3333-4444-555555555555", resource="https://vault.azure.net"`)
		fail(http.StatusUnauthorized, "Unauthorized", "no token")
		return
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/") // keys/NAME[/VERSION][/create|/sign]
	if len(parts) < 2 || parts[0] != "keys" {
		http.NotFound(w, r)
		return
	}
	last := parts[len(parts)-1]
	if err := v.refuse(r.Method + " " + last); err != nil {
		fail(http.StatusInternalServerError, "InternalServerError", err.Error())
		return
	}
	var in struct {
		Kty     string `json:"kty"`
		Crv     string `json:"crv"`
		KeySize int    `json:"key_size"`
		Alg     string `json:"alg"`
		Value   string `json:"value"`
	}
	if r.Method == http.MethodPost {
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&in); err != nil {
			fail(http.StatusBadRequest, "BadParameter", err.Error())
			return
		}
	}
	if r.Method == http.MethodPost && last == "create" {
		kind := strings.ReplaceAll(in.Crv, "-", "")
		if in.Kty == "RSA" {
			kind = fmt.Sprint("RSA", in.KeySize)
		}
		signer, err := makeSigner(kind)
		if err != nil {
			fail(http.StatusBadRequest, "BadParameter", err.Error())
			return
		}
		version := make([]byte, 16)
		rand.Read(version)
		k := &vaultKey{id: hex.EncodeToString(version), name: parts[1], signer: signer}
		v.add(k)
		if err := v.refuse("created"); err != nil { // the answer is lost
			fail(http.StatusInternalServerError, "InternalServerError", err.Error())
			return
		}
		answer(w, http.StatusOK, map[string]any{"key": azureJWK(k)})
		return
	}
	version := ""
	if len(parts) > 2 && parts[2] != "sign" {
		version = parts[2]
	}
	k := v.find(func(k *vaultKey) bool { return k.name == parts[1] && (version == "" || k.id == version) })
	if k == nil {
		fail(http.StatusNotFound, "KeyNotFound", "A key with (name/id) "+parts[1]+" was not found in this key vault.")
		return
	}
	if r.Method == http.MethodGet {
		answer(w, http.StatusOK, map[string]any{"key": azureJWK(k)})
		return
	}
	hash, known := map[string]crypto.Hash{"ES256": crypto.SHA256, "ES384": crypto.SHA384, "RS256": crypto.SHA256}[in.Alg]
	digest, err := base64.RawURLEncoding.DecodeString(in.Value)
	if public, ok := k.signer.Public().(*ecdsa.PublicKey); ok { // as Azure: the hash that fits the curve, and no other
		known = known && public.Curve.Params().BitSize == 8*hash.Size()
	}
	if last != "sign" || !known || err != nil {
		fail(http.StatusBadRequest, "BadParameter", in.Alg)
		return
	}
	signature, err := k.signer.Sign(rand.Reader, digest, hash)
	if err != nil {
		fail(http.StatusBadRequest, "BadParameter", err.Error())
		return
	}
	if public, ok := k.signer.Public().(*ecdsa.PublicKey); ok { // R and S side by side
		var rs struct{ R, S *big.Int }
		if _, err := asn1.Unmarshal(signature, &rs); err != nil {
			fail(http.StatusInternalServerError, "InternalServerError", err.Error())
			return
		}
		size := (public.Curve.Params().BitSize + 7) / 8
		signature = append(rs.R.FillBytes(make([]byte, size)), rs.S.FillBytes(make([]byte, size))...)
	}
	answer(w, http.StatusOK, map[string]any{"kid": azureKID(k), "value": base64.RawURLEncoding.EncodeToString(signature)})
}

func azureKID(k *vaultKey) string {
	return "https://signet.vault.azure.net/keys/" + k.name + "/" + k.id
}

func azureJWK(k *vaultKey) map[string]any {
	enc := base64.RawURLEncoding.EncodeToString
	out := map[string]any{"kid": azureKID(k)}
	switch public := k.signer.Public().(type) {
	case *ecdsa.PublicKey:
		point, err := public.Bytes()
		if err != nil {
			return nil
		}
		size := len(point) / 2
		out["kty"], out["crv"] = "EC", public.Curve.Params().Name
		out["x"], out["y"] = enc(point[1:1+size]), enc(point[1+size:])
	case *rsa.PublicKey:
		out["kty"], out["n"], out["e"] = "RSA", enc(public.N.Bytes()), enc(big.NewInt(int64(public.E)).Bytes())
	}
	return out
}
