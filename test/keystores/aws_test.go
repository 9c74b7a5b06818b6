//go:build cgo

package keystores_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
)

// serveAWS is AWS KMS, as far as the driver and the look-up call it: JSON 1.1, the operation in a header.
func serveAWS(v *vault, w http.ResponseWriter, r *http.Request) {
	fail := func(code int, kind, message string) {
		w.Header().Set("X-Amzn-ErrorType", kind)
		answer(w, code, map[string]string{"__type": kind, "message": message})
	}
	operation := strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	if !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/") {
		fail(http.StatusBadRequest, "MissingAuthenticationTokenException", "not signed")
		return
	}
	if err := v.refuse(operation); err != nil {
		fail(http.StatusInternalServerError, "KMSInternalException", err.Error())
		return
	}
	var in struct {
		KeyID               string `json:"KeyId"`
		KeySpec             string
		KeyUsage            string
		Description         string
		AliasName           string
		TargetKeyID         string `json:"TargetKeyId"`
		Message             []byte
		MessageType         string
		SigningAlgorithm    string
		CiphertextBlob      []byte
		EncryptionAlgorithm string
		Marker              string
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&in); err != nil {
		fail(http.StatusBadRequest, "SerializationException", err.Error())
		return
	}
	key := func(id string) *vaultKey {
		k := v.find(func(k *vaultKey) bool { return k.id == id })
		if k == nil {
			fail(http.StatusBadRequest, "NotFoundException", "Key does not exist")
		}
		return k
	}
	switch operation {
	case "CreateKey":
		signer, err := makeSigner(map[string]string{"ECC_NIST_P256": "P256", "ECC_NIST_P384": "P384", "RSA_2048": "RSA2048"}[in.KeySpec])
		if err != nil || in.KeyUsage != "SIGN_VERIFY" {
			fail(http.StatusBadRequest, "ValidationException", fmt.Sprint(err, in.KeyUsage))
			return
		}
		id := make([]byte, 16)
		rand.Read(id)
		h := hex.EncodeToString(id)
		k := &vaultKey{id: strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-"), name: in.Description, signer: signer}
		v.add(k)
		answer(w, http.StatusOK, map[string]any{"KeyMetadata": map[string]any{"KeyId": k.id, "Enabled": true, "Description": k.name}})
	case "CreateAlias":
		if k := key(in.TargetKeyID); k != nil {
			v.mu.Lock()
			k.aliases = append(k.aliases, in.AliasName)
			v.mu.Unlock()
			answer(w, http.StatusOK, map[string]any{})
		}
	case "ListAliases", "ListKeys":
		v.mu.Lock()
		defer v.mu.Unlock()
		// One entry a page, so that paging is seen.
		at := 0
		_, _ = fmt.Sscan(in.Marker, &at)
		out := map[string]any{"Truncated": at+1 < len(v.keys)}
		if at+1 < len(v.keys) {
			out["NextMarker"] = fmt.Sprint(at + 1)
		}
		aliases, keys := []map[string]any{}, []map[string]any{}
		if at < len(v.keys) {
			keys = append(keys, map[string]any{"KeyId": v.keys[at].id})
			for _, a := range v.keys[at].aliases {
				aliases = append(aliases, map[string]any{"AliasName": a, "TargetKeyId": v.keys[at].id})
			}
		}
		out["Keys"], out["Aliases"] = keys, aliases
		answer(w, http.StatusOK, out)
	case "DescribeKey":
		if k := key(in.KeyID); k != nil {
			answer(w, http.StatusOK, map[string]any{"KeyMetadata": map[string]any{"KeyId": k.id, "Enabled": true, "Description": k.name}})
		}
	case "GetPublicKey":
		if k := key(in.KeyID); k != nil {
			der, err := x509.MarshalPKIXPublicKey(k.signer.Public())
			if err != nil {
				fail(http.StatusInternalServerError, "KMSInternalException", err.Error())
				return
			}
			answer(w, http.StatusOK, map[string]any{"KeyId": k.id, "PublicKey": der})
		}
	case "Sign":
		k := key(in.KeyID)
		if k == nil {
			return
		}
		hash, known := map[string]crypto.Hash{"ECDSA_SHA_256": crypto.SHA256, "ECDSA_SHA_384": crypto.SHA384, "RSASSA_PKCS1_V1_5_SHA_256": crypto.SHA256}[in.SigningAlgorithm]
		if public, ok := k.signer.Public().(*ecdsa.PublicKey); ok { // AWS signs with the hash that fits the curve, and with no other
			known = known && public.Curve.Params().BitSize == 8*hash.Size()
		}
		if !known || in.MessageType != "DIGEST" {
			fail(http.StatusBadRequest, "ValidationException", in.SigningAlgorithm)
			return
		}
		signature, err := k.signer.Sign(rand.Reader, in.Message, hash)
		if err != nil {
			fail(http.StatusBadRequest, "ValidationException", err.Error())
			return
		}
		answer(w, http.StatusOK, map[string]any{"KeyId": k.id, "Signature": signature, "SigningAlgorithm": in.SigningAlgorithm})
	case "Decrypt":
		k := key(in.KeyID)
		if k == nil {
			return
		}
		private, ok := k.signer.(*rsa.PrivateKey)
		if !ok || in.EncryptionAlgorithm != "RSAES_OAEP_SHA_256" {
			fail(http.StatusBadRequest, "InvalidKeyUsageException", in.EncryptionAlgorithm)
			return
		}
		plain, err := private.Decrypt(rand.Reader, in.CiphertextBlob, &rsa.OAEPOptions{Hash: crypto.SHA256})
		if err != nil {
			fail(http.StatusBadRequest, "InvalidCiphertextException", "")
			return
		}
		answer(w, http.StatusOK, map[string]any{"KeyId": k.id, "Plaintext": plain})
	default:
		fail(http.StatusBadRequest, "UnknownOperationException", operation)
	}
}
