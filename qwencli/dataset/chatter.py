"""What models say in place of a caption, in front of it and behind it.

Refusals and introductions are looked for where they stand: at the beginning of an answer, in first
person or as a label, so that a sign in the picture that says "I'm sorry" is no refusal. "The image
shows" is how many captions begin, and no introduction. English has most of the phrases, ten other
languages the common ones; what is in no table is not found.
"""

from __future__ import annotations

import re

_FLAGS = re.IGNORECASE

_CANNOT = (
    r"(?:cannot|can't|can not|won't|will not|must decline|have to decline|"
    r"(?:am|'m) (?:unable|not able|not comfortable|not allowed|not permitted|programmed)|"
    r"(?:don't|do not) (?:feel comfortable|have the (?:ability|capability)))"
)
_REFUSED = (
    r"(?:assist|help|provid|describ|identif|analy[sz]|caption|process|compl[yi]|fulfil|generat|"
    r"creat|writ|answer|discuss|engag|continu|view|see |seeing|look at|access|interpret|do that|"
    r"determin|recogni[sz]|offer|support|share|tag )"
)
_LEAD = (
    r"(?:(?:well|sorry|unfortunately|oh|however|but|hmm|thank you[^.\n]{0,60}|as an?[^.\n]{0,60}|"
    r"while[^.\n]{0,80}|given[^.\n]{0,60}|due to[^.\n]{0,60})[,;.!]? *)?"
)
_PICTURE = r"(?:image|picture|photo|photograph|attachment|file)s?"
_REFUSALS = (
    rf"{_LEAD}I ?{_CANNOT}\b[^.!?\n]{{0,60}}?{_REFUSED}",
    r"(?:oh,? )?(?:I'm|I am|we're|we are) (?:so |very |really |truly |afraid )?"
    r"(?:sorry|afraid)\b",
    r"sorry,? (?:but|I|for|we|this|that|the|no)\b|sorry[,.!—:-]",
    r"(?:I|we) (?:do |must |deeply |sincerely )?apologi[sz]e",
    r"(?:my |our )?apologies[,.!]",
    rf"unfortunately,? (?:I|we|(?:the|this) {_PICTURE} "
    r"(?:cannot|can't|could not|was not|is not))\b",
    r"no (?:caption|description|answer|response|image)(?: is| was)? ?(?:available|provided|"
    r"possible|found|generated)",
    r"(?:n/?a|none|null|undefined|unknown|not applicable|nan|error)[.!]?\s*$",
    rf"(?:I|we) (?:need|require) (?:more|additional|an?|the) [^.\n]{{0,30}}(?:information|context|"
    rf"{_PICTURE})",
    r"as an? (?:AI|artificial|(?:large )?language model|assistant|text-based|vision)\b",
    r"I(?:'m| am) (?:just |only |merely )?an? "
    r"(?:AI|artificial|(?:large )?language model|text-based)",
    rf"I (?:do not|don't|cannot|can't) (?:actually )?(?:see|have access to|view|find|open) "
    rf"(?:any |an |the |this |that )?{_PICTURE}",
    rf"(?:it (?:seems|appears|looks like) (?:that )?|I see )?(?:there(?:'s| is| was) )?no "
    rf"{_PICTURE}[^.\n]{{0,30}}(?:provided|attached|uploaded|available|given|included)",
    rf"(?:please|could you|can you)(?: please)? (?:provide|upload|share|attach|send)[^.\n]{{0,40}}"
    rf"{_PICTURE}",
    r"(?:it|that) (?:seems|appears|looks like) (?:that )?you "
    r"(?:haven't|have not|did not|didn't|forgot)",
    rf"(?:this|the|your) (?:{_PICTURE}|content|request) (?:violates|goes against|may violate|"
    r"is (?:inappropriate|against)|(?:cannot|can't) be (?:described|captioned|processed))",
    r"(?:对不起|抱歉|很抱歉|非常抱歉|不好意思|我无法|我不能|無法|我無法|作为一个?(?:AI|人工智能)|"
    r"由于[^。\n]{0,20}我(?:无法|不能))",
    r"(?:申し訳(?:ありません|ございません)|すみません[、が。]|ごめんなさい|私は[^。\n]{0,12}できません)",
    r"(?:죄송(?:합니다|하지만)|저는[^.\n]{0,20}(?:할 수 없|없습니다))",
    r"(?:lo siento[,.]|lo lamento|no puedo (?:ayudar|asistir|describir|proporcionar|identificar))",
    r"(?:(?:je suis )?désolée?\b|je ne peux pas (?:aider|décrire|fournir|identifier|vous)|"
    r"je regrette)",
    r"(?:(?:es )?tut mir leid|entschuldigung[,.]|leider kann ich|"
    r"ich kann (?:ihnen |dir |ihnen dabei |dabei |bei |diese[sn]? )[^.\n]{0,40}nicht)",
    r"(?:mi dispiace|non posso (?:aiutar|descriver|fornir))",
    r"(?:desculpe|sinto muito|lamento[,.]|não posso (?:ajudar|descrever|fornecer))",
    r"(?:извините|простите,|к сожалению,? я|прошу прощения|я не могу (?:помочь|описать|предоста))",
)

_WORKS = (
    r"(?:captions?|descriptions?|alt[- ]text|prompts?|tags?|(?:tag )?list|analysis|breakdown|"
    r"summary|overview|answer|response|version|sentence|paragraph|keywords?|transcription|details?)"
)
_ADJECTIVES = (
    r"(?:(?:short|detailed|image|photo|picture|final|suggested|possible|brief|long|one-sentence|"
    r"refined|improved|generated|training|english|cinematic|the|your|my|revised) )*"
)
_PREAMBLES = (
    r"(?:sure|certainly|of course|absolutely|okay|gladly|definitely)(?: thing)?\b"
    r"(?:[^.\n]{0,4}[!,.:;]|[^.\n]{0,90}:(?:\s|$)| here\b)",
    r"(?:ok|great|alright|got it|no problem|understood|happy to help|with pleasure)[!,.:] ",
    r"(?:I'd be happy to|I(?:'ll| will) (?:describe|write|provide|give|create|generate|analy[sz]e)|"
    r"let me (?:describe|write|provide|give|create|take|analy[sz]e)|let's (?:look|describe|analy))",
    rf"(?:here(?:'s| is| are)|below (?:is|are)|(?:the )?following (?:is|are))"
    rf"(?: [\w,'’-]+){{0,8}}? {_WORKS}\b[^.!?\n]{{0,120}}?(?::|\n|[.!] |[.!]?$)",
    rf"this is(?: [\w,'’-]+){{0,8}}? {_WORKS}\b[^.!?\n]{{0,80}}?:(?:\s|$)",
    r"here (?:you go|it is|they are)\b",
    r"(?:the|this|your) (?:image|picture|photo) (?:that )?you(?:'ve| have)? "
    r"(?:provided|uploaded|shared|attached|sent|gave)",
    r"(?:captions?|descriptions?|summary|analysis) of (?:the|this|your) "
    r"(?:image|picture|photo)[*_ ]*:",
    r"(?:caption|description|alt[- ]text|prompt|tags)[*_ ]*\n",
    # Turns of a conversation, and their marks.
    r"<\|[a-z_]+\|>|(?:user|assistant|system)\s*\n",
    rf"{_ADJECTIVES}(?:image )?(?:captions?|descriptions?|alt[- ]text|prompts?|tags|keywords|"
    r"answer|output|response|assistant)(?: \d+)?[*_\"' ]*[:：]",
    rf"(?:based on|looking at|from|after (?:analy[sz]ing|examining|reviewing)) (?:the|this|your) "
    rf"(?:\w+ )?{_PICTURE}(?: provided| you provided)?,? "
    r"(?:here(?:'s| is| are)|I (?:can|would|will|have|see)|I'd|I'll)\b",
    r"(?:以下是|下面是|好的[，,。!！]|当然[，,。!！可]|"
    r"这是[^。\n]{0,24}(?:描述|标题|说明|提示词)[^。\n]{0,6}[:：]|"
    r"根据(?:图片|图像|您)[^。\n]{0,30}[:：]|(?:图片|图像)?(?:描述|标题|说明)[:：])",
    r"(?:以下(?:は|の|に)[^。\n]{0,40}(?:説明|キャプション|描写|です)|はい、|もちろん|承知|"
    r"(?:説明|キャプション)[:：])",
    r"(?:다음은[^.\n]{0,40}(?:설명|캡션)|물론(?:입니다|이죠)|네,|"
    r"여기[^.\n]{0,24}(?:설명|캡션)|(?:설명|캡션):)",
    r"(?:aquí (?:tienes|está|hay)\b|claro[,!.]|por supuesto[,!.]|a continuación|descripción:)",
    r"(?:voici (?:une?|la|le|votre|les)\b[^.\n]{0,50}(?:légende|description|liste)|"
    r"bien sûr[,!.]|d'accord[,!.]|certainement[,!.]|légende ?:|description ?:)",
    r"(?:hier (?:ist|sind)\b[^.\n]{0,80}(?:beschreibung|bildunterschrift|liste|:)|natürlich[,!.]|"
    r"gerne?[,!.]|selbstverständlich[,!.]|(?:bild)?beschreibung:|bildunterschrift:)",
    r"(?:ecco (?:la|il|una?|i|le)\b[^.\n]{0,60}(?:didascalia|descrizione|:)|certo[,!.]|"
    r"descrizione:)",
    r"(?:aqui está\b|claro[,!.]|com certeza[,!.]|descrição:|legenda:)",
    r"(?:вот (?:описание|подпись|краткое|подробное)|конечно[,!.]|описание:)",
)

_CLOSINGS = (
    r"(?:please )?let me know (?:if|what|whether|how)|"
    r"(?:I )?hope (?:this|that|it) (?:\w+ ){0,2}helps|feel free to|"
    r"would you like me to|do you want me to|"
    r"if you(?:'d like| would like| want| need| have)\b[^.\n]{0,20} "
    r"(?:me|any|more|further|another|help)\b|"
    r"is there anything else|"
    r"(?:如果您|如需|希望这|请告诉我|您是否|请随时)|(?:お知らせください|お役に立て|お気軽に)|"
    r"(?:si necesitas|espero que (?:esto|te)|no dudes)|"
    r"(?:n'hésitez pas|j'espère que (?:cela|cette))|"
    r"(?:lass(?:en Sie)? (?:es )?mich wissen|ich hoffe, (?:das|dies))"
)

_LABEL = re.compile(
    r"^[ \t*_#>]*(?:final |image |short |suggested )?captions?(?: \d+)?[ *_]*:|^[ \t]*```|"
    r"<\|im_(?:start|end)\|>",
    re.IGNORECASE | re.MULTILINE,
)

# What may stand in front: marks of Markdown, quotes, emphasis.
_DECORATION = " \t\n*_#>\"'`-.:,("


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), _FLAGS)


_REFUSAL, _PREAMBLE, _CLOSING = map(_any_of, (_REFUSALS, _PREAMBLES, (_CLOSINGS,)))


def find_refusal(text: str) -> str | None:
    """The words with which an answer refuses, or says that it saw no picture."""
    return _beginning(_REFUSAL, text)


def find_preamble(text: str) -> str | None:
    """An introduction in front of the caption, or a label on a line that names it."""
    found = _LABEL.search(text)
    return _beginning(_PREAMBLE, text) or (found[0].strip() if found else None)


def find_closing(sentence: str) -> str | None:
    """A last sentence that talks to the user."""
    return _beginning(_CLOSING, sentence)


def _beginning(pattern: re.Pattern[str], text: str) -> str | None:
    plain = text[:500].replace("’", "'").replace("‘", "'").lstrip(_DECORATION)
    found = pattern.match(plain)
    return found[0].strip() if found else None
